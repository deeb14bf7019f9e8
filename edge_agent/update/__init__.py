"""How a new release reaches this device, and why the device always keeps one that works.

    lifecycle.py      which step may follow which: a pure table, with a row for power loss everywhere
    machine.py        performs the steps for one model; a newer generation pre-empts it at any time
    certificates.py   which certificates hold of what is here, and how it gets others
    updater.py        what the hub wants, what serves after a start, what is reported
    surroundings.py   what an update needs of the device around it
    slots.py          what is on the disk, and the order of fsyncs that survives a cut anywhere
    disk.py           the few operations on files that this order is made of
    selftest.py       golden inputs on the real provider, in a child process with limits
    by_hand.py        releases that a person gives to this device: tested, too, before they serve
    fetch.py          what this device needs of a release: joins the two below
    trust.py          what the hub has signed (TUF)
    download.py       blocks over HTTP, resumed and checked

Nothing here answers requests: ``agent.py`` passes in what switches the serving engine.
"""

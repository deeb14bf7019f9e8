"""The model story on the hub: who may call, which devices there are, what they should run.

fleet.py          joins the parts below
releases.py       accepts bundles: checks, tries, numbers, stores, signs
lineage.py        which release came from which; workshop_report.py: what the workshop says of it
golden.py         the self-test on the hub's own engine
upload.py         a bundle as one stream, and what a hostile one may not do
artifacts.py      files by digest, served in parts
trust.py          the TUF repository: what exists, signed; keys.py: with which keys
certificates.py   risk certificates as objects of their own: issued, replaced, withdrawn
controller.py     what is wanted of each device, and what it says
arrivals.py       how what devices say is written down
outbox.py         what must still be published, until the broker has it
link.py           the hub's end of MQTT; mosquitto.py: a broker of our own
devices.py        devices seen, and the one rule of presence
reports.py        the door for what devices count
identity.py       bearer tokens of callers from other machines; callers.py: who they stand for
"""

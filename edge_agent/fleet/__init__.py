"""What the hub wants of this device, and what it learns of it.

contact.py      where the hub's broker and files are
link.py         the device's end of MQTT: desired states in, births and reports out
twin.py         the documents: what is wanted, how models stand
telemetry.py    counts what the router answered, and reports the counts
"""

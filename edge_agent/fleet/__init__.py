"""What the hub wants of this device, and what it learns of it.

link.py         the device's end of MQTT: desired states in, births and reports out
twin.py         desired against reported: what is adopted, ignored or refused
telemetry.py    counts what the router answered, and reports the counts
"""

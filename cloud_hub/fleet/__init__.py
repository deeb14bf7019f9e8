"""The fleet's side of the hub: who may call, which devices there are, what they report.

identity.py   bearer tokens of callers from other machines
devices.py    devices seen, and the one rule of presence
reports.py    the door for what devices count
"""

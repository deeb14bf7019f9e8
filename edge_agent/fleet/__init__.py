"""What the hub learns of this device.

telemetry.py    counts what the router answered, and reports the counts
"""

"""The story of a request on the device.

router.py       the agent as an Open Inference server: answers here, escalates, merges rows
parameters.py   what a request may ask of the agent
local.py        the answer from here: the device's own engine, and a score for each row
policy.py       pure: which rows escalate, and what quality an answer has
rows.py         pure: rows counted, chosen, and merged with the hub's
consent.py      pure: what the hub may keep of requests, to learn from it
audits.py       which sure rows the hub answers too, so that what it keeps speaks of all requests
uplink.py       the connection to the hub: coalesces, retries once, probes, counts bytes
breaker.py      pure: when the hub is asked and when it is left alone
"""

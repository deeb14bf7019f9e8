"""The story of a request on the device.

router.py       the agent as an Open Inference server: answers here, decides, escalates
served.py       a release in service, and what its answers may claim
parameters.py   what a request may ask of the agent
local.py        the answer from here: the device's own engine, and a score for each row
policy.py       pure: which rows escalate, and what quality an answer has
escalation.py   the way to the hub: what is asked, and its rows merged
rows.py         pure: rows counted, chosen, and merged with the hub's
consent.py      pure: what the hub may keep of requests, to learn from it
audits.py       which sure rows the hub answers too, so that what it keeps speaks of all requests
uplink.py       the connection to the hub: coalesces, retries once, probes, counts bytes
breaker.py      pure: when the hub is asked and when it is left alone
"""

"""The story of a request on the device.

router.py     the agent as an Open Inference server: answers here, escalates, merges rows
audits.py     which sure rows the hub answers too, so that what it keeps speaks of all requests
policy.py     pure: which rows escalate, and what quality an answer has
uplink.py     the connection to the hub: coalesces, retries once, probes, counts bytes
breaker.py    pure: when the hub is asked and when it is left alone
"""

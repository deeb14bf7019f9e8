"""What the fleet did: counts over time.

counts.py    cumulative telemetry as values: differences, sums, quantiles; pure
history.py   accepts reports, keeps the recent window, persists minutes
"""

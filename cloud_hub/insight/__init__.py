"""What the fleet did, and what there is to learn from it.

counts.py         cumulative telemetry as values: differences, sums, quantiles; pure
history.py        accepts reports, keeps the recent window, persists minutes
examples.py       keeps what devices let the hub keep: queue, writer, quota, retention, export
example_rows.py     their rows; example_files.py: their inputs on the disk, by content
example_codec.py    as bytes, on the disk and on the way to the workshop; pure
quota.py            who gives up examples when there are too many; pure
dataset.py        makes a data set of an export: npz, parquet
"""

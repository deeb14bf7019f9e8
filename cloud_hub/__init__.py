"""The hub: answers what devices escalate, and brings models to the fleet.

cli.py          the command `fogline`; of the fleet cli_fleet.py, of kept examples cli_data.py
command.py      what its commands share: options, the log, how one ends
operate.py      the operator's commands, over the hub's API
doctor.py       what a hub would find on this machine
tuning/         which batch, instances and threads suit a model on this machine
hub.py          the composition root: the only file that knows all sides
config.py       options from flags, environment and TOML
errors.py       what may go wrong before or beside a request
inference/      the request story: door -> server -> batcher -> engine
engines/        what runs a model: ONNX Runtime, TensorRT
fleet/          the model story: releases, devices, what is wanted of them
insight/        what the fleet did: counts over time
console/        pages and API for operators
store/          the database: one writer, many readers
metrics.py      what Prometheus reads
"""

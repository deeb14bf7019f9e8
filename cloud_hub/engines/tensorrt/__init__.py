"""TensorRT: a plan is built from an ONNX file on the machine that runs it, kept, and run.

session.py        one plan on one GPU
plan_policy.py    when TensorRT takes over from ONNX Runtime (pure)
plan_key.py       what a plan is made for (pure)
plans.py          building plans in a child process, and keeping them
plan_builder.py   that child process
api.py            the members of TensorRT and CUDA that are called, typed by hand
cuda.py           devices, streams and buffers
log.py            why TensorRT refused
errors.py         what may go wrong with a GPU
"""

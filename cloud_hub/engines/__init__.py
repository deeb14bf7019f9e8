"""What runs a model on the hub: arrays in, arrays out.

engine.py         the contract: one loaded model
onnx_runtime.py   the embedded default, on the CPU or through CUDA
tensorrt.py       one TensorRT plan on one GPU
plan_policy.py    when TensorRT takes over from ONNX Runtime (pure)
plan_key.py       what a plan is made for (pure)
plans.py          building plans in a child process, and keeping them
plan_builder.py   that child process
tensorrt_api.py   the members of TensorRT and CUDA that are called, typed by hand
tensorrt_cuda.py  devices, streams and buffers
tensorrt_log.py   why TensorRT refused
gpu_errors.py     what may go wrong with a GPU
probe.py          what this machine can really run
"""

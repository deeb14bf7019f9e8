"""What runs a model on the hub: arrays in, arrays out.

onnx_runtime.py   the embedded default, on the CPU or through CUDA
"""

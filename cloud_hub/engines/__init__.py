"""What runs a model on the hub: arrays in, arrays out.

engine.py         the two contracts: a session runs here and now, an engine is waited for
launch.py         which engine a model gets: inline if its runs are proven short, else a process
onnx_runtime.py   a session of ONNX Runtime, on the CPU or through CUDA
tensorrt/         a session of TensorRT, and the plans it runs
inline.py         an engine in this process
process.py        an engine in a child process, replaced when it hangs or dies
worker.py         that child process
upstream.py       an engine that is another server: Triton, KServe, another hub
retry_budget.py   may a request to it be made once more? (pure)
channel.py        how both exchange tensors: a socket, and memory that both map
probe.py          what this machine can really run
"""

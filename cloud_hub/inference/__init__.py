"""The request story on the hub.

server.py       stands behind the doors: finds the model, checks the request, answers
repository.py   which models are served, and from which files
acceleration.py when a model moves to TensorRT, and back
batcher.py      gathers requests into batches for the engines of one model
queue.py        the pure rule for which requests leave together, when, and in whose turn
cache.py        keeps answers for requests that come again (pure)
admission.py    who calls, and how much of it is let in
limits.py       the pure rule for how often, and how much at once, one caller may ask
tracing.py      which requests are traced, and the files of their traces
"""

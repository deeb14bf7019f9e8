"""The request story on the hub.

server.py       stands behind the doors: finds the model, checks the request, answers
repository.py   which models are served, and from which files
batcher.py      gathers requests into batches for one engine
queue.py        the pure rule for which requests leave together, and when
tracing.py      which requests are traced, and the files of their traces
admission.py    who may call
"""

"""The request story on the hub.

server.py       stands behind the doors: finds the model, checks the request, answers
repository.py   which models are served, and from which files
batcher.py      gathers requests into batches for one engine
queue.py        the pure rule for which requests leave together, and when
cache.py        keeps answers for requests that come again (pure)
admission.py    who may call
"""

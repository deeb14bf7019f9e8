"""What runs a model on this device, wherever it is asked from.

providers.py    what the device can really run, proven by running it
variants.py     which artifact of a bundle suits the device, and why
engine.py       one loaded variant: arrays in, arrays out
release.py      a bundle that is loaded: engine, certificate, score
"""

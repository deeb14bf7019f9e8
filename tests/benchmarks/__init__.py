"""Figures, measured side by side in one run: only ratios within one run are worth quoting.

./run bench             everything
./run bench serving     the hub against the raw ONNX Runtime session
./run bench agent       the agent in process against a raw session run
"""

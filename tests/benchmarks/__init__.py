"""Figures, measured side by side in one run: only ratios within one run are worth quoting.

./run bench             everything
./run bench serving     the hub against the raw ONNX Runtime session and against PyTriton
./run bench agent       the agent in process against a raw session run
./run bench switching   what callers of an agent see while its release is switched
./run bench workshop    what the workshop makes of two nets, in its own environment
./run bench soak        the hub under everything at once for two minutes: does it all add up?
"""

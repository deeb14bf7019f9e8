"""The workshop: from a trained net to a bundle that a fleet can trust. Offline, never on a device.

    cli.py        fogline-models build | certify
    export.py     a torch module to an ONNX file, checked against torch
    graph.py      what is done to any ONNX file: read, take in, strip, check, write
    quantize.py   an fp32 ONNX file to the forms that pay, per hardware class
    sensitivity.py  the layers that quantization hurts, and the fewest to keep in fp32
    evaluate.py   what each variant is worth: accuracy, agreement, size, latency, self-test
    bound.py      the exact binomial bound; pure
    certify.py    a threshold with its bound, measured on this machine
    bundle.py     the directory that hub and device accept; nothing half-written
    session.py    runs an ONNX file on one execution provider, or fails
    archive.py    npz files: same arrays, same bytes
    errors.py     what the caller must change; what must be installed

Heavy packages are imported on use. ``certify`` needs numpy and onnxruntime only, because it
also runs where the certified file will: on a machine of the device's hardware class.
"""

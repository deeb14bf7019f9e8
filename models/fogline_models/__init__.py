"""The workshop: from a trained net to a bundle that a fleet can trust. Offline, never on a device.

    cli.py        fogline-models build | certify | inspect | compare
    export.py     a torch module to a stripped ONNX file, checked against torch
    quantize.py   an fp32 ONNX file to int8 with quantize/dequantize nodes
    evaluate.py   what each variant is worth against labels, the original and the hub; self-test
    metrics.py    the figures and their intervals; pure
    measure.py    what each variant costs on this machine: time, memory, loading
    gates.py      which variants may ship, with every figure and bar; pure
    report.py     report.json, and report.html made from it alone
    plots.py      the report's plots as SVG; pure
    card.py       the model card, inside the digest
    comparison.py what changes from one bundle to the next, and what a device fetches for it
    inspection.py everything that is in a bundle
    wording.py    figures as people read them; pure
    bound.py      the exact binomial bound; pure
    certify.py    a threshold with its bound, measured on this machine
    bundle.py     the directory that hub and device accept; nothing half-written
    session.py    runs an ONNX file on one execution provider, or fails
    archive.py    npz files: same arrays, same bytes
    errors.py     what the caller must change; what must be installed

Heavy packages are imported on use. ``certify`` needs numpy and onnxruntime only, because it
also runs where the certified file will: on a machine of the device's hardware class.
"""

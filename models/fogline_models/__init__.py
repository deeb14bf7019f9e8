"""The workshop: from a trained net to a bundle that a fleet can trust. Offline, never on a device.

    cli.py            fogline-models build | export | quantize | evaluate | bundle | certify | ...
    recipe.py         what a family of releases is made from, as one file says it
    reference.py      every key of a recipe, printed from recipe.py's own comments
    pairing.py        which hub can answer what an edge is asked; pure
    provenance.py     what a bundle has learnt from, so that nothing is certified on it
    build.py          a recipe, step by step: data, export, quantize, run, measure
    steps.py          steps kept by content, so that a build goes on where it stopped
    assemble.py       what was measured becomes what ships: gates, bundle, certificates, report
    splits.py         what a recipe's data is split into, completed and checked
    reading.py        how a release's answers are read, and whether its data fits them
    data.py           items on the disk, and that splits of them do not overlap
    hooks.py          the Python beside a recipe
    sources.py        a torch module, a Hugging Face model or an ONNX file, made alike
    export.py         a torch module to an ONNX file, checked against torch
    graph.py          what is done to any ONNX file: read, take in, strip, check, write
    forms.py          what a net can be quantized to, per hardware class; pure
    quantize.py       an fp32 ONNX file to any of those forms
    sensitivity.py    the layers that quantization hurts, and the fewest to keep in fp32
    evaluate.py       what each variant is worth against labels, the original and the hub
    metrics.py        the figures and their intervals; pure
    measure.py        what each variant costs on this machine: time, memory, loading
    gates.py          which variants may ship, with every figure and bar; pure
    bound.py          the exact binomial bound; pure
    certify.py        a threshold with its bound, measured on this machine
    head.py           the combined score: a head fitted to the hub's answers, never on calibration
    bundle.py         the directory that hub and device accept; nothing half-written
    card.py           the model card, inside the digest
    report.py         report.json, and report.html made from it alone
    plots.py          the report's plots as SVG; pure
    wording.py        figures as people read them; pure
    comparison.py     what changes from one bundle to the next, and what a device fetches for it
    inspection.py     everything that is in a bundle
    side_by_side.py   files compared without a recipe
    doctor.py         what this environment can export, quantize and measure
    session.py        runs an ONNX file on one execution provider, or fails
    archive.py        npz files: same arrays, same bytes
    errors.py         what the caller must change; what must be installed

Heavy packages are imported on use. ``certify`` needs numpy and onnxruntime only, because it
also runs where the certified file will: on a machine of the device's hardware class.
"""

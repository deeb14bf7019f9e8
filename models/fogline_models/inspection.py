"""Says everything that is in a verified bundle: for people, or as JSON."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from fogline_models import report
from fogline_models.data import drawn
from fogline_models.wording import percent, size
from fogline_protocol.certificate import Certificate
from fogline_protocol.golden import GoldenVectors, VectorsUnusable
from fogline_protocol.release import ROOT, BundleDirectory
from fogline_protocol.score import Score
from fogline_protocol.tensors import TensorSpec


def document(found: BundleDirectory) -> Mapping[str, Any]:
    """Return everything that a bundle says of itself, as plain values."""
    bundle = found.bundle
    written = report.read(found.path)
    return {
        "model": bundle.model,
        "version": bundle.version,
        "description": bundle.description,
        "sha256": found.sha256,
        "bytes": sum(file.bytes for file in bundle.files.values()),
        "inputs": [_spec(spec) for spec in bundle.inputs],
        "outputs": [_spec(spec) for spec in bundle.outputs],
        "pre_processing": [str(step) for step in bundle.pre_processing],
        "post_processing": [str(step) for step in bundle.post_processing],
        "max_batch": bundle.max_batch,
        "labels": list(bundle.labels),
        "score": None if bundle.score is None else dataclasses.asdict(bundle.score),
        "escalates_to": None
        if bundle.escalates_to is None
        else {
            "model": bundle.escalates_to.model,
            "bundle_sha256": bundle.escalates_to.bundle_sha256,
        },
        "variants": [
            {
                "name": v.name,
                "precision": v.precision,
                "providers": list(v.providers),
                "max_rows": v.max_rows,
                "path": v.path,
                "bytes": bundle.files[v.path].bytes,
                "sha256": found.variant_sha256(v),
                "max_abs_error": bundle.self_test.tolerances[v.name].max_abs_error,
                "min_agreement": bundle.self_test.tolerances[v.name].min_agreement,
            }
            for v in bundle.variants
        ],
        "self_test": {"path": bundle.self_test.path, **_rows(found)},
        "files": {
            name: {"bytes": file.bytes, "sha256": file.sha256}
            for name, file in sorted(bundle.files.items())
        },
        "beside": _beside(found),
        "certificates": [_certificate(found, each) for each in found.certificates],
        "decisions": []
        if written is None
        else [each["sentence"] for each in written["decisions"]["variants"]],
        "machine": {} if written is None else dict(written["machine"]),
    }


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield a ``document`` as a person reads it in a terminal."""
    yield f"{told['model']} {told['version']}  {told['description']}".rstrip()
    yield f"  bundle      {told['sha256']}, intact"
    for what in ("inputs", "outputs"):
        for spec in told[what]:
            yield f"  {what[:-1]:<11} {spec['name']} {spec['datatype']} {spec['shape']}"
    for when, step in (("before it", "pre_processing"), ("after it", "post_processing")):
        for each in told[step]:
            yield f"  {when:<11} {each}"
    rows = "no batch dimension" if not told["max_batch"] else f"up to {told['max_batch']} rows"
    yield f"  batch       {rows}"
    if told["labels"]:
        shown = ", ".join(told["labels"][:12])
        more = f", ... ({len(told['labels'])} in all)" if len(told["labels"]) > 12 else ""
        yield f"  labels      {shown}{more}"
    if told["score"] is not None:
        yield f"  score       {Score(**told['score'])}"
    if told["escalates_to"] is not None:
        hub = told["escalates_to"]
        yield f"  escalates   to {hub['model']}, bundle {hub['bundle_sha256'][:16]}"
    yield f"  self-test   {told['self_test']['said']}"
    yield from ("", "variants")
    what = "tokens" if told["score"] is not None and Score(**told["score"]).per_token else "rows"
    for v in told["variants"]:
        alone = ", one row in a run" if v["max_rows"] == 1 else ""
        yield f"  {v['name']}  {v['precision']}, {size(v['bytes'])}, for {', '.join(v['providers'])}{alone}"
        stray = f"      may stray by {v['max_abs_error']:g} from the reference"
        if v["min_agreement"] > 0:
            stray += f", and must keep its answer on {percent(v['min_agreement'], 0)} of the golden {what}"
        yield stray
        yield f"      {v['path']}  {v['sha256']}"
    yield from ("", "certificates")
    for each in told["certificates"]:
        yield f"  {each['id']}  {each['variant']} on {each['hardware_class']}"
        yield f"      {each['said']}"
        yield f"      issued {each['issued_at']}, expires {each['expires_at']}"
        if each["objection"] is not None:
            yield f"      does not hold here: {each['objection']}"
    if not told["certificates"]:
        yield "  none"
    if told["decisions"]:
        yield from ("", "gates, as report.json says")
        for sentence in told["decisions"]:
            yield f"  {sentence}"
    yield from ("", "files")
    for name, file in told["files"].items():
        yield f"  {file['sha256']}  {file['bytes']:>12,}  {name}"
    for name in told["beside"]:
        yield f"  {'not covered by the digest':<64}  {'':>12}  {name}"


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _rows(found: BundleDirectory) -> dict[str, Any]:
    """Return how many golden rows there are, or why the vectors cannot be used."""
    try:
        vectors = GoldenVectors.read(found.bundle, found.file(found.bundle.self_test.path))
    except VectorsUnusable as error:
        return {"rows": 0, "said": f"cannot be used: {error}"}
    if not found.bundle.max_batch:
        return {"rows": 1, "said": "one golden run"}
    rows = len(next(iter(vectors.inputs.values())))
    return {"rows": rows, "said": f"{rows} golden rows"}


def _beside(found: BundleDirectory) -> list[str]:
    """Return what lies in the folder without being covered by the digest."""
    return sorted(
        name
        for path in found.path.rglob("*")
        if (path.is_symlink() or path.is_file())
        and (name := path.relative_to(found.path).as_posix()) != ROOT
        and name not in found.bundle.files
    )


def _certificate(found: BundleDirectory, each: Certificate) -> dict[str, Any]:
    objection = "it names a variant that the bundle does not have"
    for variant in found.bundle.variants:
        if variant.name == each.variant:
            covered = found.variant_sha256(variant) == each.variant_sha256
            objection = "" if covered else "it was measured on another file"
    bounded = math.isfinite(each.threshold)
    said = (
        f"above {each.threshold:.4f} answers locally, escalates {percent(each.escalation_rate)}; "
        if bounded
        else "never answers locally; "
        if each.threshold > 0
        else "always answers locally; "
    )
    return {
        "id": each.id,
        "variant": each.variant,
        "hardware_class": each.hardware_class,
        "hub_model": each.hub_model,
        "hub_sha256": each.hub_sha256,
        "alpha": each.alpha,
        "delta": each.delta,
        "threshold": each.threshold if bounded else None,
        "escalation_rate": each.escalation_rate,
        "scenes": each.scenes,
        "sampling": each.sampling,
        "issued_at": each.issued_at.isoformat(),
        "expires_at": each.expires_at.isoformat(),
        "said": said + f"at most {each.alpha:.3g} of all requests differ from {each.hub_model}, "
        f"with confidence {1 - each.delta:g}, from {each.scenes:,} scenes ({drawn(each.sampling)})",
        "objection": objection or None,
    }

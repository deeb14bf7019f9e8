"""What a bundle has seen, as its own files tell: a bound holds only for items that it has not.

``sources.json`` lists every split by the digest of its items, and the self-test vectors are items
of the training split, if the recipe gave no others. Both lie below the bundle's digest, so they
are as true as the bundle is.
"""

import json
from collections.abc import Mapping
from pathlib import PurePath

from fogline_models import data
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_protocol.golden import GoldenVectors, VectorsUnusable
from fogline_protocol.release import BundleDirectory

SOURCES = "sources.json"
LEARNT_FROM = ("training", "ranges", "self_test", "tuning", "examples")
HELD_OUT = ("calibration", "evaluation")


def check_unseen(directory: BundleDirectory, items: Items, what: str) -> str:
    """Check that a release has not learnt from items, and return what is only suspicious of them.

    Args:
        directory: the release.
        items: that a certificate is to rest on.
        what: they are called, for people.

    Raises:
        BadInput: it has: no bound holds for them.
    """
    title = f"{directory.bundle.model} {directory.bundle.version}"
    advice = "no bound holds on items that a model or its score has seen: calibrate on others"
    digests = {items.sha256, data.digest(items)}
    same = {
        PurePath(name).stem: name
        for name, digest in _listed(directory).items()
        if digest in digests
    }
    for split in LEARNT_FROM:
        if split in same:
            raise BadInput(
                f"{what}: {title} has learnt from these items, as {same[split]}: {advice}"
            )
    unclear = [name for split, name in same.items() if split not in HELD_OUT]
    if unclear:
        return (
            f"{what}: {title} lists these items among what it was made from, as {unclear[0]}: if "
            "it was trained on them, no bound holds"
        )
    try:
        golden = GoldenVectors.read(
            directory.bundle, directory.file(directory.bundle.self_test.path)
        )
    except VectorsUnusable:
        return ""  # said by who runs it
    known = data.contents(Items(golden.inputs)).keys()
    shared = len(known & data.contents(items).keys())
    if 1 < shared == len(known):
        raise BadInput(
            f"{what}: all {shared} self-test items of {title}, which are of what it was trained "
            f"on, are among these: {advice}"
        )
    if shared:
        return (
            f"{what}: {shared} of {len(known)} self-test items of {title}, which are of what it "
            "was trained on, are among these: unless they are alike by chance, no bound holds"
        )
    return ""


def _listed(directory: BundleDirectory) -> Mapping[str, str]:
    """Return the digests that a bundle lists, by name; none, if it was made elsewhere."""
    if SOURCES not in directory.bundle.files:
        return {}
    try:
        inputs = json.loads(directory.file(SOURCES).read_bytes())["inputs"]
        return {str(name): str(each["sha256"]) for name, each in inputs.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}

"""A release that is loaded and may be served: bundle, engine, certificate, score.

``load`` is the way from a directory to something that answers. It blocks for as long as
ONNX Runtime needs; call it in a thread while another release is being served. Whether the
answers are right is for the self-test to say, before: ``update/by_hand.py``, ``update/machine.py``.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime import providers, variants
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.variants import Choice
from fogline_protocol import release as protocol
from fogline_protocol import score as scores
from fogline_protocol.release import Bundle, BundleDirectory
from fogline_protocol.tensors import Array


@dataclass(slots=True, eq=False)
class Release:
    """One bundle, loaded. Whoever serves it closes its engine."""

    directory: BundleDirectory
    choice: Choice
    engine: Engine
    number: int = 0  # the hub's number of the release; 0: installed by hand
    # [n, ...] -> [n], after the bundle's mask if its score names one; None: there is no scale
    score: Callable[..., Array] | None = None

    @property
    def bundle(self) -> Bundle:
        """The root document."""
        return self.directory.bundle

    @property
    def label(self) -> str:
        """What people call it, e.g. ``digits@1.0.0``."""
        return f"{self.bundle.model}@{self.bundle.version}"

    @property
    def version(self) -> str:
        """What Open Inference calls it. By convention there is no version 0."""
        return str(self.number or 1)


def read(path: Path) -> BundleDirectory:
    """Return the verified bundle in ``path``.

    Raises:
        ReleaseRefused: it is not intact; the text says why.
    """
    try:
        return protocol.read(path)
    except protocol.BundleRefused as error:
        raise ReleaseRefused(f"bundle {path}: {error}") from None


def load(
    directory: BundleDirectory,
    *,
    provider: str = "",
    threads: int = 0,
    number: int = 0,
    choice: Choice | None = None,
) -> Release:
    """Load a verified bundle: ``choice``, or the best variant for this device now.

    ``provider`` restricts that to one execution provider, ``threads`` 0 leaves their number to
    the engine, and ``number`` is the release's in the fleet, 0 if it came by hand.

    Raises:
        ReleaseRefused: it cannot run here; the text says why.
    """
    choice = choice or choose(directory, provider)
    bundle = directory.bundle
    score = None
    if bundle.score is not None:
        try:
            score = scores.scorer(bundle.score)
        except KeyError:
            raise ReleaseRefused(
                f"{directory.path}: score function {bundle.score.function!r} is unknown to this "
                f"agent, which knows {', '.join(scores.FUNCTIONS)}"
            ) from None
    engine = Engine(
        directory.file(choice.variant.path),
        provider=choice.provider,
        inputs=bundle.inputs,
        outputs=bundle.outputs,
        threads=threads,
    )
    return Release(directory, choice, engine, number, score)


def certified(release: Release, directory: BundleDirectory) -> Release:
    """Return what is loaded already, under the certificates of ``directory``: the same files.

    The engine is shared, so only one of the two is served at a time.
    """
    now = datetime.datetime.now(datetime.UTC)
    choice = variants.under(directory, release.choice, providers.hardware_class, now)
    return replace(release, directory=directory, choice=choice)


def choose(directory: BundleDirectory, provider: str = "") -> Choice:
    """Return the variant for this device, as ``variants.choose`` does.

    Raises:
        ReleaseRefused: nothing of it runs here, or ``provider`` does not exist here.
    """
    usable = providers.usable()
    broken = {p.name: p.objection for p in providers.probe() if p.objection is not None}
    if provider:
        if provider not in usable:
            why = broken.get(provider, "this ONNX Runtime does not have it")
            raise ReleaseRefused(
                f"provider {provider} cannot be used on this device: "
                f"{why}; usable are {', '.join(usable)}"
            )
        usable, broken = (provider,), {}
    return variants.choose(
        directory,
        usable,
        providers.hardware_class,
        datetime.datetime.now(datetime.UTC),
        broken=broken,
    )

"""What surrounds an updater, in miniature: bundles whose weights are one number, a hub that is a
folder, a self-test and a service that multiply. Each passes the contract of the real thing.
"""

import asyncio
import datetime
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime.variants import Choice
from edge_agent.update.lifecycle import StepFailed, StepInterrupted, StepRefused
from edge_agent.update.machine import ModelReport
from edge_agent.update.slots import Target, certificate_id, release_number
from edge_agent.update.surroundings import Place, Progress
from fogline_protocol import certificate, documents, release
from fogline_protocol.golden import Deviates, GoldenVectors, judge
from fogline_protocol.release import Bundle, BundleDirectory, File, SelfTest, Tolerance, Variant
from fogline_protocol.tensors import Array, TensorSpec
from tests.certificates import certificate as a_certificate

BLOCK = 64
RIGHT, WRONG = 2.0, -2.0  # what a model multiplies with, and should
CPU = "CPUExecutionProvider"


def weights(factor: float, version: str = "") -> bytes:
    return json.dumps({"factor": factor, "version": version, "padding": "." * 500}).encode()


def make_bundle(
    folder: Path,
    version: str,
    *,
    model: str = "doubler",
    factor: float = RIGHT,
    provider: str = CPU,
) -> BundleDirectory:
    """Write a bundle with two variants of a model that multiplies by ``factor``."""
    (folder / "variants").mkdir(parents=True)
    rows = np.arange(1, 25, dtype=np.float32).reshape(8, 3)
    np.savez(folder / "selftest.npz", **{"input.x": rows, "output.y": rows * np.float32(RIGHT)})
    for name in ("fp32", "int8"):
        (folder / f"variants/{name}.onnx").write_bytes(weights(factor, f"{version} {name}"))
    (folder / "README.md").write_text("# doubler\n", encoding="utf-8")
    files = ("selftest.npz", "variants/fp32.onnx", "variants/int8.onnx", "README.md")
    bundle = Bundle(
        model=model,
        version=version,
        inputs=(TensorSpec("x", "FP32", (-1, 3)),),
        outputs=(TensorSpec("y", "FP32", (-1, 3)),),
        max_batch=5,
        variants=tuple(
            Variant(name, f"variants/{name}.onnx", name, (provider,)) for name in ("int8", "fp32")
        ),
        self_test=SelfTest(
            "selftest.npz", {name: Tolerance(0.01, 0.99) for name in ("fp32", "int8")}
        ),
        files={
            name: File(documents.sha256_of_file(folder / name), (folder / name).stat().st_size)
            for name in files
        },
    )
    (folder / release.ROOT).write_bytes(bundle.to_json())
    return release.read(folder)


def choose(directory: BundleDirectory) -> Choice:
    """Take the first variant for the CPU that is certified, or else the first."""
    here = [
        variant
        for variant in directory.bundle.variants
        if CPU in variant.providers
        and (directory.present is None or variant.name in directory.present)
    ]
    for variant in here:
        certified = [c for c in directory.certificates if c.variant == variant.name]
        if certified:
            latest = max(certified, key=lambda c: c.issued_at)
            return Choice(variant, CPU, latest, "it is certified")
    if here:
        return Choice(here[0], CPU, None, "it is the first")
    raise ReleaseRefused(f"{directory.bundle.model}: nothing runs on {CPU}")


class Shelf:
    """A hub that is a folder of bundles, ``<model>/<release>``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(
        self,
        number: int,
        version: str,
        *,
        model: str = "doubler",
        factor: float = RIGHT,
        **more: str,
    ) -> Target:
        make_bundle(self.folder / model / str(number), version, model=model, factor=factor, **more)
        return self.target(number, version, model=model)

    def target(self, number: int, version: str, *, model: str = "doubler") -> Target:
        return Target(model, number, version, f"{model}/{number}/index.json")

    def certify(self, target: Target, day: int, *, variant: str = "int8", **changes: str) -> str:
        """Issue a certificate of ``target`` on some day; return its target path."""
        made = a_certificate(
            model=target.model,
            version=changes.get("version", target.version),
            variant=variant,
            hub_model="doubler-hub",
            hardware_class="here",
            issued_at=datetime.datetime(2026, 10, day, tzinfo=datetime.UTC),
        )
        path = f"certificates/{target.model}/{target.release}/{made.id}.json"
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(made.to_json())
        return path


class CopyFetch:
    """Copies a release from a shelf, block by block, and resumes."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.reachable = True
        self.calls = 0
        self.blocks_copied = 0
        self.certificates_asked: list[str] = []
        self.before_block: Callable[[], None] = lambda: None
        self.gate = asyncio.Event()  # closed: stops between two blocks
        self.gate.set()
        self.waiting = asyncio.Event()

    async def fetch(self, target: Target, into: Path, progress: Progress) -> None:
        """Fill ``into``; see ``surroundings.Fetch``."""
        self.calls += 1
        if not self.reachable:
            raise StepInterrupted("download/unreachable", "the hub does not answer")
        source = self.shelf.folder / target.model / str(target.release)
        if not source.is_dir():
            raise StepRefused("download/unknown", f"there is no release {target.release}")
        small = ["bundle.json", "selftest.npz", "README.md"]
        for name in small:
            await self._copy(source, into, name)
        certificates = await self.certificates(target.certificate_targets)
        shutil.rmtree(into / "certificates", ignore_errors=True)
        directory = replace(
            release.read(into, variants=()),
            present=None,
            certificates=tuple(map(certificate.parse, certificates.values())),
        )
        try:
            chosen = choose(directory).variant.path
        except ReleaseRefused as error:
            raise StepRefused("download/no-variant", str(error)) from None
        await self._copy(source, into, chosen)
        wanted = {*small, chosen}
        _keep_only(into, wanted)
        for id, data in certificates.items():
            (into / "certificates").mkdir(exist_ok=True)
            (into / f"certificates/{id}.json").write_bytes(data)
        total = sum((source / name).stat().st_size for name in wanted)
        progress(total, total)

    async def certificates(self, targets: Collection[str]) -> Mapping[str, bytes]:
        """Return what was certified; see ``surroundings.Fetch``."""
        self.certificates_asked += targets
        if targets and not self.reachable:
            raise StepInterrupted("download/unreachable", "the hub does not answer")
        found = {}
        for target in targets:
            self.before_block()
            try:
                found[certificate_id(target)] = (self.shelf.folder / target).read_bytes()
            except FileNotFoundError:
                raise StepInterrupted("metadata/unknown-target", f"not signed: {target}") from None
        return found

    async def withdrawn(self, targets: Collection[str]) -> frozenset[str]:
        """Return what was taken from the shelf; see ``surroundings.Fetch``."""
        if not self.reachable:
            raise StepInterrupted("download/unreachable", "the hub does not answer")
        return frozenset(certificate_id(t) for t in targets if not (self.shelf.folder / t).exists())

    async def _copy(self, source: Path, into: Path, name: str) -> None:
        data = (source / name).read_bytes()
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            here = (into / name).read_bytes()
            if here != data[: len(here)]:
                file.truncate(0)
                here = b""
            for start in range(len(here) // BLOCK * BLOCK, len(data), BLOCK):
                if not self.gate.is_set():
                    self.waiting.set()
                    await self.gate.wait()
                self.before_block()
                file.truncate(start)
                file.write(data[start : start + BLOCK])
                file.flush()
                self.blocks_copied += 1


def _keep_only(folder: Path, wanted: set[str]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in wanted:
            path.unlink()


def multiply(
    directory: BundleDirectory, path: str
) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    factor = np.float32(json.loads(directory.file(path).read_bytes())["factor"])
    return lambda inputs: {"y": inputs["x"] * factor}


class StubSelfTest:
    """Judges as the real one does, in this process."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures: list[StepFailed] = []  # to raise, one per call
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = asyncio.Event()

    async def run(
        self, candidate: BundleDirectory, variant: str, provider: str
    ) -> Mapping[str, float]:
        """Return figures, or raise; see ``surroundings.SelfTest``."""
        self.calls += 1
        if not self.gate.is_set():
            self.waiting.set()
            await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        bundle = candidate.bundle
        golden = GoldenVectors.read(bundle, candidate.file(bundle.self_test.path))
        run = multiply(candidate, bundle.variant(variant).path)
        answers = [run(inputs) for inputs in golden.batches(bundle.variant(variant))]
        try:
            figures = judge(bundle, golden, answers, bundle.self_test.tolerances[variant])
        except Deviates as error:
            raise StepRefused("self-test/deviation", str(error), error.figures) from None
        return {**figures, "seconds": 0.0, "peak_bytes": 0.0}


class FakeServing:
    """Serves by multiplying. ``active`` is what a caller would be answered with."""

    def __init__(self) -> None:
        self.active: dict[str, BundleDirectory | None] = {}
        self.variants: dict[str, str] = {}
        self.history: list[str | None] = []  # versions, as they were activated
        self.refusals: list[Exception] = []  # to raise, one per activation
        self.engine_faults = 0
        self.answers_wrongly = False

    async def activate(self, model: str, bundle: BundleDirectory | None) -> None:
        """Switch; see ``surroundings.Serving``."""
        if self.refusals:
            raise self.refusals.pop(0)
        self.active[model] = bundle
        if bundle is not None:
            self.variants[model] = choose(bundle).variant.name
        self.history.append(None if bundle is None else bundle.bundle.version)

    def place(self, model: str) -> Place | None:
        """Return what is active."""
        bundle = self.active.get(model)
        if bundle is None:
            return None
        return Place(release_number(bundle.path), self.variants[model], CPU)

    def certify(self, model: str, bundle: BundleDirectory) -> None:
        """Answer under other certificates; see ``surroundings.Serving``."""
        assert self.active[model] is not None
        self.active[model] = bundle

    def certificate(self, model: str = "doubler") -> str:
        """Return the id of the certificate that a caller is answered under."""
        bundle = self.active[model]
        assert bundle is not None
        here = [c for c in bundle.certificates if c.variant == self.variants[model]]
        return max(here, key=lambda c: c.issued_at).id if here else ""

    async def run(self, model: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Answer with what is active."""
        bundle = self.active[model]
        assert bundle is not None
        if self.answers_wrongly:
            return {"y": -inputs["x"]}
        return multiply(bundle, bundle.bundle.variant(self.variants[model]).path)(inputs)

    def faults(self, model: str) -> int:
        """Return the number the test has set."""
        return self.engine_faults


class Reports:
    """Keeps what is reported, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[tuple[ModelReport, ...]] = []
        self._changed = asyncio.Condition()

    async def report(self, models: tuple[ModelReport, ...]) -> None:
        """Keep one report."""
        async with self._changed:
            self.seen.append(models)
            self._changed.notify_all()

    async def until(
        self, condition: Callable[[ModelReport], bool], model: str = "doubler"
    ) -> ModelReport:
        """Return the newest report on ``model`` once it satisfies ``condition``."""

        def newest() -> ModelReport | None:
            models = self.seen[-1] if self.seen else ()
            return next((m for m in models if m.model == model), None)

        def satisfied() -> bool:
            found = newest()
            return found is not None and condition(found)

        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(satisfied)
            found = newest()
            assert found is not None
            return found

    def phases(self, model: str = "doubler") -> list[str]:
        """Return the phases of ``model`` as they were reported, repetitions left out."""
        phases: list[str] = []
        for models in self.seen:
            for entry in models:
                if entry.model == model and entry.phase != (phases or [""])[-1]:
                    phases.append(entry.phase)
        return phases

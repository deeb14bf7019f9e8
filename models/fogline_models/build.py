"""Builds the releases of a recipe, step by step. The composition root of the workshop.

    data ─► export ─► quantize (each form) ─► run ─► measure ─► gates ─► bundle ─► certify ─► report
             │                                 │                                     │
             └ golden vectors of the origin    └ the hub's model on the same items ──┘

Everything up to the gates is a step kept by content (``steps.py``), so a build that was
interrupted, or whose recipe changed in one place, does only what is due. What follows is made
anew each time: it is quick, and certificates are dated. Digests of what a bundle's root names
depend on recipe, data, code and tools alone; timings and certificates lie beside it.
"""

import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fogline_models import (
    archive,
    bundle,
    data,
    export,
    forms,
    graph,
    head,
    hooks,
    huggingface,
    measure,
    metrics,
    pairing,
    pooling,
    preprocess,
    provenance,
    quantize,
    report,
    sensitivity,
    session,
    sources,
)
from fogline_models.assemble import PARENT, Built, Hub, Measured, finish
from fogline_models.data import Items
from fogline_models.errors import BadInput, require
from fogline_models.forms import FORMS, computes_here, processors_of
from fogline_models.graph import Signature
from fogline_models.measure import Cost
from fogline_models.pairing import Contract, by_name
from fogline_models.quantize import DynamicQuantizer
from fogline_models.reading import check_head, check_inputs, check_tokens, mask_for, reading
from fogline_models.recipe import FP32, VECTORS, Recipe, ReleaseRecipe
from fogline_models.session import Session, hardware_class
from fogline_models.splits import TRAINED_ON, made_splits, publish
from fogline_models.steps import Progress, Say, Steps, code, digest, paced, tools
from fogline_protocol import documents, hardware
from fogline_protocol.release import BundleDirectory
from fogline_protocol.score import PARAMETERS
from fogline_protocol.tensors import Array, TensorSpec

BUNDLES = "bundles"
LATENCY_BATCHES = (1, 8, 32)
RUN_ROWS = 64  # at once, when a whole split is run


def build(
    recipe: Recipe,
    out: Path,
    steps: Steps,
    say: Say,
    *,
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
) -> tuple[Built, ...]:
    """Build every release of ``recipe`` below ``out``, in the order of the recipe.

    Raises:
        BadInput: of a step; names the step, the thing and what to do. Releases that were
            finished before it stay, nothing half-written does.
        MissingExtra: a package that a step needs is not installed.
    """
    return _Build(recipe, out, steps, say, now).run()


def export_only(recipe: Recipe, steps: Steps) -> Path:
    """Return the folder that the source of the recipe's only release becomes.

    Raises:
        BadInput, MissingExtra: as ``build``.
    """
    steps.expect(("data", "export"))
    return _Build(
        recipe, Path(), steps, lambda line: None, lambda: datetime.datetime.now(datetime.UTC)
    ).export_only()


def quantize_file(
    model: Path,
    form: str,
    ranges: Mapping[str, Array] | None,
    path: Path,
    *,
    keep: tuple[str, ...] = (),
    sweep: float | None = None,
    mask: str = "",
    vectors: bool = False,
    say: Say,
    props: Mapping[str, str] | None = None,
    dynamic: DynamicQuantizer = quantize.with_onnxruntime,
) -> tuple[str, ...]:
    """Write one form of an fp32 file to ``path`` and return the nodes that stayed fp32.

    With ``sweep`` the fewest nodes are found for which agreement with fp32 reaches it; of outputs
    for tokens, on those where the input ``mask``, by default attention_mask, is not 0; of
    ``vectors``, features, it is their mean cosine.

    Raises:
        BadInput: as ``quantize`` and ``sensitivity.mixed``; or a mask is named that is no input, or
            without a sweep, which alone asks for it.
    """
    if mask and sweep is None:
        raise BadInput("quantize: mask: only a sweep asks what counts: add one, or leave it out")
    if sweep is not None:
        if ranges is None:
            raise BadInput("quantize: a sweep measures agreement on training items: give it some")
        if mask and mask not in ranges:
            raise BadInput(f"quantize: mask: there is no input {mask!r}, only {', '.join(ranges)}")
        choice, _ = sensitivity.mixed(
            model,
            form,
            ranges,
            ranges,
            sweep,
            clock=time.monotonic,
            mask=mask_for(mask, ranges),
            vectors=vectors,
            progress=_sweeping(say),
        )
        kept = len(choice.keep)
        say(f"{kept} {'node stays' if kept == 1 else 'nodes stay'} fp32")
        keep = (*keep, *choice.keep)
    quantize.quantize(model, form, ranges, props or {}, path, keep=keep, dynamic=dynamic, say=say)
    return keep


def _noting(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, what)


class _Build:
    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        steps: Steps,
        say: Say,
        now: Callable[[], datetime.datetime],
    ) -> None:
        self._recipe = recipe
        self._out = out
        self._steps = steps
        self._say = say
        self._now = now
        self._data: tuple[report.Input, ...] = ()
        self._exported: dict[tuple[str, str], Path] = {}  # by model and version
        self._finished: dict[tuple[str, str], Built] = {}

    def run(self) -> tuple[Built, ...]:
        recipe = self._recipe
        self._steps.expect(_planned(recipe))
        for each in recipe.release:
            self._check_given(each)
        splits, self._data = made_splits(recipe, self._steps)
        for each in recipe.release:
            _check_examples(each, splits)
            if each.escalates_to and not self._is_own(each.escalates_to):
                self._check_foreseen(each, splits)
                self._check_unseen(each, splits)
        publish(recipe, splits, self._out)
        return tuple(self._release(each, splits) for each in recipe.release)

    def export_only(self) -> Path:
        splits, self._data = made_splits(self._recipe, self._steps, only_training=True)
        return self._export(self._recipe.release[0], splits)

    def _release(self, each: ReleaseRecipe, splits: Mapping[str, Items]) -> Built:
        recipe = self._recipe
        self._check_foreseen(each, splits)
        folder = self._export(each, splits)
        self._exported[each.model, each.version] = folder
        prepared = folder / sources.PREPARED
        if prepared.is_dir():
            splits = {path.stem: data.read(path) for path in sorted(prepared.glob("*.npz"))}
        exported = sources.Exported.read(folder)
        signature = sources.signature(folder, each.source)
        golden = self._golden(each)
        read_by = reading(recipe, signature, each, golden)
        check_inputs(signature, splits, recipe.data.used, each)
        check_head(recipe, exported, signature, splits, each)
        hub, parent = self._hub(each), self._parent(each)
        labels = recipe.labels or exported.labels
        _check_pair(each, by_name(signature.inputs), by_name(signature.outputs), labels, hub)
        check_tokens(splits, read_by, each)
        files = {FP32: folder / sources.FP32}
        for name in recipe.variants(each):
            if name != FP32:
                files[name] = self._quantize(
                    each, name, files[FP32], splits["ranges"], read_by.mask
                )
        found = Measured(
            recipe=recipe,
            release=each,
            exported=exported,
            signature=signature,
            reading=read_by,
            extras=sources.extras(folder),
            golden=golden,
            files=files,
            splits=splits,
            outputs=self._outputs(each, files, splits, hub, parent, signature),
            costs=self._measure(each, files, splits["evaluation"], signature),
            hub=hub,
            parent=parent,
            inputs=self._inputs(each),
            steps=_did(each, recipe.score(each), exported, files, splits),
        )
        target = self._out / BUNDLES / each.folder
        try:
            built = finish(found, target, now=self._now(), say=self._say)
        except BadInput as error:
            if each.title in str(error):
                raise
            raise type(error)(f"{each.title}: {error}") from None
        self._finished[each.model, each.version] = built
        return built

    def _export(self, each: ReleaseRecipe, splits: Mapping[str, Items]) -> Path:
        recipe, source = self._recipe, each.source
        seen = dict(splits)
        if not source.huggingface:  # what must not be seen in training is not handed over
            seen = {name: seen[name] for name in TRAINED_ON}
        if each.examples is not None:
            seen["examples"] = data.read(recipe.folder / each.examples)
            kept_apart = {
                name: splits[name]
                for name in ("calibration", "evaluation", head.TUNING)
                if name in splits
            }
            data.check_disjoint({"examples": seen["examples"], **kept_apart})
        functions: dict[str, object] = {
            "hooks": hooks.digests(recipe.folder),
            "reads": hooks.hashed(hooks.reads(recipe.folder, recipe.reads)),
        }
        facts: dict[str, object] = {
            "props": sources.props(recipe, each, FP32),
            "task": recipe.task,
            "labels": recipe.labels,
            "max_batch": each.max_batch,
            "outputs": source.outputs,
            "dynamic": {name: dict(axes) for name, axes in source.dynamic.items()},
            "arguments": source.arguments,
            "splits": {name: items.sha256 for name, items in seen.items()},
            "machine": hardware.this_machine(),  # weights differ in their last bits elsewhere
            **code(archive, data, export, graph, session, sources),
            **tools("onnxruntime", extra="models"),  # answers the self-test, and checks
        }
        if source.torch:
            packages = ["torch", "onnx", "onnxscript", "numpy"]
            facts |= {"torch": source.torch, **functions}
        elif source.huggingface:
            packages = ["torch", "onnx", "transformers", "tokenizers", "optimum-onnx", "numpy"]
            facts |= {"huggingface": source.huggingface, **code(huggingface, pooling, preprocess)}
            if hooks.is_function(source.huggingface):
                facts |= functions
            else:
                place = recipe.folder / source.huggingface
                facts["folder"] = {
                    path.relative_to(place).as_posix(): documents.sha256_of_file(path)
                    for path in sorted(place.rglob("*"))
                    if path.is_file()
                }
        else:
            packages = ["onnx", "numpy"]
            assert source.onnx is not None
            path = recipe.folder / source.onnx
            facts["onnx"] = digest(path, "source.onnx")
            facts["weights"] = hooks.hashed(_weights(path))
        return self._steps.make(
            each.title,
            "export",
            {**facts, **tools(*packages, extra="hf" if source.huggingface else "models")},
            lambda into, say: sources.make(recipe, each, seen, into, say),
        )

    def _quantize(
        self, each: ReleaseRecipe, form: str, fp32: Path, ranges: Items, mask: str
    ) -> Path:
        props = sources.props(self._recipe, each, form)
        sweep = each.sweep.get(form)
        mask = "" if sweep is None else mask_for(mask, ranges.inputs)  # nothing else asks for it
        vectors = self._recipe.task in VECTORS
        facts = {
            "props": props,
            "vectors": vectors,
            "fp32": documents.sha256_of_file(fp32),
            "ranges": ranges.sha256,
            "keep": each.keep.get(form, ()),
            "sweep": sweep,
            "mask": mask,
            "machine": hardware.this_machine(),  # ranges are read off runs here
            **code(archive, forms, graph, metrics, quantize, sensitivity, session),
            **tools("onnx", "onnxruntime", extra="models"),
        }
        dynamic: DynamicQuantizer = quantize.with_onnxruntime
        if each.source.huggingface:  # what optimum exported, optimum quantizes
            dynamic = huggingface.quantize_dynamic
            facts |= {**code(huggingface), **tools("optimum-onnx", extra="hf")}

        def make(into: Path, say: Say) -> None:
            quantize_file(
                fp32,
                form,
                ranges.inputs,
                into / f"{form}.onnx",
                keep=each.keep.get(form, ()),
                sweep=sweep,
                mask=mask,
                vectors=vectors,
                say=say,
                props=props,
                dynamic=dynamic,
            )

        return self._steps.make(each.title, f"quantize {form}", facts, make) / f"{form}.onnx"

    def _outputs(
        self,
        each: ReleaseRecipe,
        files: Mapping[str, Path],
        splits: Mapping[str, Items],
        hub: Hub | None,
        parent: BundleDirectory | None,
        signature: Signature,
    ) -> Mapping[str, Mapping[str, Array]]:
        """Return what every variant, and the hub's model, gives on the splits: by split, name."""
        wanted = ("evaluation", *self._recipe.data.also, "ranges", "self_test")
        if PARAMETERS[self._recipe.score(each)]:
            wanted = tuple(dict.fromkeys((*wanted, head.split_of(splits))))
        output = signature.outputs[0].name
        sessions = dict(files)
        processors = {name: processors_of(name) for name in files}
        if hub is not None:
            sessions[hub.name], processors[hub.name] = hub.file, hub.variant.processors
        if parent is not None:
            taken = by_name(parent.bundle.inputs)
            if pairing.takes(by_name(signature.inputs), taken):
                first = parent.bundle.variants[0]
                sessions[PARENT], processors[PARENT] = parent.file(first.path), first.processors
            else:
                self._say(
                    f"{each.title}: not compared with {parent.bundle.version}, which takes "
                    f"different inputs: {', '.join(taken)}"
                )
        # What this processor's kernels would cut off is run as it is written.
        here = hardware.this_machine()
        as_written = {name for name in sessions if not hardware.suits(here, processors[name])}
        facts = {
            "files": {name: documents.sha256_of_file(path) for name, path in sessions.items()},
            "as written": sorted(as_written),
            "splits": {name: splits[name].sha256 for name in wanted},
            "output": output,
            "rows": (rows := min(RUN_ROWS, each.max_batch) if signature.batched else 1),
            "hardware": hardware_class(),
            **code(archive, forms, session),
        }

        def make(into: Path, say: Say) -> None:
            arrays: dict[str, Array] = {}
            progress = paced(say)
            for name, path in sessions.items():
                running = Session(path, as_written=name in as_written)
                for split in wanted:
                    heard = _noting(progress, f"{name} on {split}")
                    answers = running.run(splits[split].inputs, rows, heard)
                    if output not in answers:
                        raise BadInput(
                            f"{name} gives no output {output!r}, only {', '.join(answers)}: what "
                            "is compared must call its answers alike"
                        )
                    arrays[f"{split}/{name}"] = answers[output]
            archive.save(into / "outputs.npz", arrays)

        made = self._steps.make(each.title, "run", facts, make)
        found: dict[str, dict[str, Array]] = {split: {} for split in wanted}
        for key, array in archive.read(made / "outputs.npz").items():
            split, name = key.split("/", 1)
            found[split][name] = array
        return found

    def _measure(
        self,
        each: ReleaseRecipe,
        files: Mapping[str, Path],
        items: Items,
        signature: Signature,
    ) -> Mapping[str, Cost]:
        files = {name: path for name, path in files.items() if computes_here(name)}
        wanted = {*LATENCY_BATCHES, (each.gates or self._recipe.gates).latency_batch}
        most = max(each.max_batch, 1) if signature.batched else 1
        batches = sorted(n for n in wanted if n <= min(most, len(items)))
        facts = {
            "files": {name: documents.sha256_of_file(path) for name, path in files.items()},
            "split": items.sha256,
            "batches": batches,
            "hardware": hardware_class(),
            **code(forms, measure, session),
        }

        def make(into: Path, say: Say) -> None:
            costs = measure.measure(files, items.inputs, batches, say=say)
            say("; ".join(f"{name} {_micros(cost)}" for name, cost in costs.items()))
            text = json.dumps({name: dataclasses.asdict(cost) for name, cost in costs.items()})
            (into / "costs.json").write_text(text, encoding="utf-8")

        made = self._steps.make(each.title, "measure", facts, make)
        document = json.loads((made / "costs.json").read_text(encoding="utf-8"))
        return {name: measure.cost_from(cost) for name, cost in document.items()}

    def _check_given(self, each: ReleaseRecipe) -> None:
        """Check what a release names outside the recipe: not only after others were trained."""
        recipe, source = self._recipe, each.source
        where = f"release {each.title}"
        if source.torch:
            require("torch", "onnx", "onnxscript", extra="models")
            hooks.load(recipe.folder, source.torch, f"{where}: source.torch")
        for key, file in (("source.onnx", source.onnx), ("examples", each.examples)):
            if file is not None:
                digest(recipe.folder / file, f"{where}: {key}")
        named = source.huggingface
        if hooks.is_function(named):
            require("torch", "onnx", "optimum", "transformers", extra="hf")
            hooks.load(recipe.folder, named, f"{where}: source.huggingface")
        elif named and not (recipe.folder / named).is_dir():
            raise BadInput(
                f"{where}: source.huggingface: there is no folder {recipe.folder / named}"
            )
        if each.escalates_to and not self._is_own(each.escalates_to):
            bundle.read(recipe.folder / each.escalates_to, f"{where}: escalates_to")
        versions = {other.version for other in recipe.release if other.model == each.model}
        if each.parent and each.parent not in versions:
            bundle.read(recipe.folder / each.parent, f"{where}: parent")

    def _is_own(self, model: str) -> bool:
        return any(other.model == model for other in self._recipe.release)

    def _check_foreseen(self, each: ReleaseRecipe, splits: Mapping[str, Items]) -> None:
        """Check that a release and its hub will be a pair, as far as that is known untrained.

        A torch module takes what its data has, and gives what the recipe calls its outputs.
        """
        if not each.source.torch:
            return
        inputs = sources.foreseen(splits["self_test"].inputs, each.source)
        outputs = dict.fromkeys(each.source.outputs)
        _check_pair(each, by_name(inputs), outputs, self._recipe.labels, self._hub(each))

    def _check_unseen(self, each: ReleaseRecipe, splits: Mapping[str, Items]) -> None:
        """Check that the hub of another recipe has not learnt from what is calibrated on."""
        hub = self._hub(each)
        if hub is None or "calibration" not in splits:
            return
        what = f"release {each.title}: split calibration"
        if caution := provenance.check_unseen(hub.directory, splits["calibration"], what):
            self._say(f"warning: {caution}")

    def _hub(self, each: ReleaseRecipe) -> Hub | None:
        """Return the model that a release escalates to, of this recipe or from a folder."""
        if not each.escalates_to:
            return None
        mine = [b for (model, _), b in self._finished.items() if model == each.escalates_to]
        if mine:
            directory = mine[-1].directory
        else:
            directory = bundle.read(self._recipe.folder / each.escalates_to, "escalates_to")
        return Hub(directory)

    def _parent(self, each: ReleaseRecipe) -> BundleDirectory | None:
        if not each.parent:
            return None
        mine = self._finished.get((each.model, each.parent))
        if mine is not None:
            return mine.directory
        return bundle.read(self._recipe.folder / each.parent, "parent")

    def _inputs(self, each: ReleaseRecipe) -> tuple[report.Input, ...]:
        """Return what a release was made from: the recipe's code, files it names, the data."""
        recipe = self._recipe
        code = hooks.files(recipe.folder) if recipe.has_code else {}
        read = hooks.reads(recipe.folder, recipe.reads) if recipe.has_code else {}
        found = [
            report.Input(name, documents.sha256_of_file(path), path.stat().st_size, what)
            for name, path, what in (
                *((name, path, "code of the recipe") for name, path in code.items()),
                *((name, path, "read by it") for name, path in read.items()),
                *_given(recipe, each),
            )
        ]
        return (*found, *self._data)

    def _golden(self, each: ReleaseRecipe) -> Mapping[str, Array]:
        version = each.version if each.accident is None else each.accident.golden_of
        return archive.read(self._exported[each.model, version] / sources.GOLDEN)


def _check_pair(
    each: ReleaseRecipe,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec | None],
    labels: tuple[str, ...],
    hub: Hub | None,
) -> None:
    if hub is None:
        return
    edge = Contract(each.title, inputs, outputs, labels)
    problem = pairing.problem(edge, Contract.of(hub.directory.bundle))
    if problem is not None:
        raise BadInput(f"release {each.title}: escalates_to: {problem}")


def _check_examples(each: ReleaseRecipe, splits: Mapping[str, Items]) -> None:
    """Check that a release's hard examples are told from the splits among its sources."""
    file = each.examples
    if file is not None and file.stem in splits and file.suffix == ".npz":
        raise BadInput(
            f"release {each.title}: examples: {file} is called like the split {file.stem}, so a "
            "bundle could list only one of the two: rename the file"
        )


def _planned(recipe: Recipe) -> Iterator[str]:
    """Yield the names of the steps of a build."""
    yield "data"
    for each in recipe.release:
        yield "export"
        yield from (f"quantize {name}" for name in recipe.variants(each) if name != FP32)
        yield from ("run", "measure")


def _given(recipe: Recipe, each: ReleaseRecipe) -> Iterator[tuple[str, Path, str]]:
    """Yield the files that the recipe names as what a release is made from.

    What belongs to a model is called by its path in the model's folder.
    """
    source = each.source
    if source.onnx is not None:
        path = recipe.folder / source.onnx
        yield path.name, path, "the model"
        for name, beside in _weights(path).items():
            yield name, beside, "weights of the model"
    if source.huggingface:
        place = recipe.folder / source.huggingface
        for path in sorted(place.rglob("*")):
            if path.is_file():
                yield path.relative_to(place).as_posix(), path, "the model"
    if each.examples is not None:
        yield each.examples.name, recipe.folder / each.examples, "hard examples"


def _weights(model: Path) -> dict[str, Path]:
    """Return the files that hold the weights of a model, by their paths from its folder."""
    return {os.path.relpath(path, model.parent): path for path in graph.external_files(model)}


def _did(
    each: ReleaseRecipe,
    score: str,
    exported: sources.Exported,
    files: Mapping[str, Path],
    splits: Mapping[str, Items],
) -> tuple[report.Step, ...]:
    """Say what was done, in words that depend on the recipe alone."""
    source = each.source
    arguments = ", ".join(f"{name}={value!r}" for name, value in source.arguments.items())
    made = (
        f"{source.torch}({arguments})" if source.torch else str(source.huggingface or source.onnx)
    )
    count = f", {exported.parameters:,} parameters" if exported.parameters is not None else ""
    steps = [report.Step("export", f"{made} from {exported.origin}{count}")]
    for name in files:
        if name != FP32:
            kept = ", ".join(each.keep.get(name, ()))
            swept = f", a sweep for {each.sweep[name]:g} agreement" if name in each.sweep else ""
            left = f", left fp32: {kept}" if kept else ""
            steps.append(report.Step(f"quantize {name}", FORMS[name].hardware + left + swept))
    if PARAMETERS[score]:
        steps.append(report.Step("score", f"{score}, fitted on {head.split_of(splits)}"))
    return tuple(steps)


def _sweeping(say: Say) -> sensitivity.Progress:
    def progress(done: int, total: int, seconds_left: float) -> None:
        say(f"sweep, {done} of {total}, {seconds_left:.0f} s left")

    return progress


def _micros(cost: Cost) -> str:
    return f"{next(iter(cost.latency_us.values())).median:.0f} us"

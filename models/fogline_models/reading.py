"""How the answers of a release are read, and that its data can be held against them."""

from collections.abc import Collection, Mapping

from fogline_models import data, graph, metrics, sources
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_models.graph import Signature
from fogline_models.recipe import VECTORS, Recipe, ReleaseRecipe
from fogline_protocol.answers import ATTENTION_MASK
from fogline_protocol.score import LEAST_PROBABILITY, MAX_PROBABILITY, Score
from fogline_protocol.tensors import Array


def reading(
    recipe: Recipe, signature: Signature, each: ReleaseRecipe, golden: Mapping[str, Array]
) -> Score:
    """Return how the answers of a release are read: from its first output.

    A recipe that names no score gets one for probabilities, if that is what ``golden``, the
    vectors of the self-test, shows the output to be.

    Raises:
        BadInput: the recipe names a mask that the model does not take, or the output of a token
            classifier has no axis for tokens.
    """
    output = signature.outputs[0]
    function = recipe.score(each)
    if not each.score and metrics.are_probabilities(golden[f"output.{output.name}"]):
        function = LEAST_PROBABILITY if recipe.per_token else MAX_PROBABILITY
    if not recipe.per_token:
        return Score(function, output.name)
    where = f"export: release {each.title}"
    if len(output.shape) < (3 if signature.batched else 2):
        raise BadInput(
            f"{where}: {recipe.task} takes outputs [n, tokens, classes], {output.name!r} is "
            f"{list(output.shape)}"
        )
    taken = [spec.name for spec in signature.inputs]
    if each.mask and each.mask not in taken:
        raise BadInput(
            f"{where}: mask: the model has no input {each.mask!r}, it takes {', '.join(taken)}"
        )
    return Score(function, output.name, mask=mask_for(each.mask, taken))


def mask_for(named: str, inputs: Collection[str]) -> str:
    """Return the input that says which tokens count, empty if all do: as named, or by default."""
    return named or (ATTENTION_MASK if ATTENTION_MASK in inputs else "")


def check_inputs(
    signature: Signature, splits: Mapping[str, Items], used: Collection[str], each: ReleaseRecipe
) -> None:
    """Check that the splits a model is run on hold what it takes, before it is.

    Raises:
        BadInput: one does not; says what its arrays must be called, or how they differ.
    """
    for name, items in splits.items():
        if name not in used:
            continue
        for spec in signature.inputs:
            if spec.name not in items.inputs:
                raise BadInput(
                    f"data: release {each.title}: the model takes {spec.name!r}, and "
                    f"{data.lacking(f'split {name}', items, data.INPUT + spec.name)}"
                )
        what = f"split {name}, release {each.title}"
        graph.check_inputs(signature, items.inputs, step="data", what=what)


def check_head(
    recipe: Recipe,
    exported: sources.Exported,
    signature: Signature,
    splits: Mapping[str, Items],
    each: ReleaseRecipe,
) -> None:
    """Check that the model has one output per class, before anything is made of it.

    Raises:
        BadInput: it has more or fewer than there are labels, or fewer than the items need.
    """
    output = signature.outputs[0]
    width = output.shape[-1] if output.shape else -1
    if recipe.task in VECTORS or width < 0:
        return
    labels = recipe.labels or exported.labels
    if width == 1 and len(labels) != 1:
        raise BadInput(
            f"export: release {each.title}: output {output.name!r} is one number, which is no "
            "choice among classes: let the model give one for each, of yes and no for instance "
            "1 - p and p"
        )
    if labels and len(labels) != width:
        raise BadInput(
            f"export: release {each.title}: output {output.name!r} has {width} classes, but "
            f"{len(labels)} labels are named: name one for each"
        )
    for name, items in splits.items():
        numbers = () if items.labels is None else data.given(items.labels).tolist()
        if max(numbers, default=-1) >= width:
            raise BadInput(
                f"export: release {each.title}: output {output.name!r} has {width} classes, but "
                f"split {name} has class number {max(numbers)}"
            )


def check_tokens(splits: Mapping[str, Items], score: Score, each: ReleaseRecipe) -> None:
    """Check that labels are of the tokens that count: not only after all variants were run."""
    for name, items in splits.items():
        if items.labels is not None and score.mask in items.inputs:
            counts = items.inputs[score.mask] != 0
            where = f"data: release {each.title}: split {name}"
            data.check_tokens(items.labels, counts, where)

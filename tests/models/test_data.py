"""Splits are read as they were written, and an item in two of them is found."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fogline_models import archive, data
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_protocol.tensors import Array

NUMBERS = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool"])


@st.composite
def items(draw: st.DrawFn) -> Items:
    count = draw(st.integers(1, 6))

    def array(dtype: st.SearchStrategy[str], *shape: int) -> Array:
        made: Array = draw(arrays.arrays(draw(dtype), (count, *shape)))
        return made

    inputs = {name: array(NUMBERS, 2) for name in draw(st.sets(st.sampled_from("abc")))}
    raw = {} if inputs else {"text": array(st.just("U5"))}
    return Items(
        inputs,
        labels=draw(st.none() | st.just(array(st.just("int64")))),
        scenes=array(st.just("int64")),
        slices=draw(st.none() | st.just(array(st.just("U3")))),
        raw=raw,
        extra={"hub": array(NUMBERS, 3)},
        sampling=draw(st.sampled_from([data.UNSTATED, "all of one day"])),
    )


def same(one: Items, other: Items) -> bool:
    first, second = data._arrays(one), data._arrays(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].tobytes() == np.asarray(second[name]).tobytes()
        for name in first
    )


@given(items())
def test_a_split_is_read_as_it_was_written_and_written_alike(
    tmp_path_factory: pytest.TempPathFactory, split: Items
) -> None:
    folder = tmp_path_factory.mktemp("split")
    data.save(folder / "a.npz", split)
    found = data.read(folder / "a.npz")
    assert same(split, found)
    data.save(folder / "b.npz", found)
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["a.npz", "b.npz"]


def images(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 2)).astype(np.uint8)


@given(
    st.integers(0, 9),
    st.randoms(use_true_random=False),
    st.sampled_from([np.uint8, np.int64, np.float32, np.float64]),
)
def test_an_item_in_two_splits_is_found_in_any_order_and_type(at, random, dtype) -> None:
    mine, other = images(10, 0), images(10, 1)
    rows = [*other, mine[at]]
    random.shuffle(rows)
    splits = {
        "training": Items({"x": mine}),
        "evaluation": Items({"x": np.array(rows).astype(dtype)}),
    }
    with pytest.raises(BadInput) as caught:
        data.check_disjoint(splits)
    assert "data: splits training and evaluation overlap: 1 item is in both" in str(caught.value)
    assert f"the first is item {at} of training" in str(caught.value)


def test_an_item_that_differs_in_one_of_its_inputs_is_another_item() -> None:
    splits = {
        name: Items({"x": images(4, 0), "y": images(4, seed)})
        for name, seed in (("training", 1), ("evaluation", 2))
    }
    data.check_disjoint(splits)


@pytest.mark.parametrize("dtype", ["U20", "S9"])
def test_a_text_is_the_same_however_long_its_neighbors_are(dtype: str) -> None:
    training = Items({}, raw={"text": np.array(["to be", "not"])})
    evaluation = Items({}, raw={"text": np.array(["question", "not"], dtype)})
    with pytest.raises(BadInput, match=r"1 item is in both, the first is item 1 of training"):
        data.check_disjoint({"training": training, "evaluation": evaluation})


def test_zero_is_zero_whatever_its_sign() -> None:
    splits = {
        "training": Items({"x": np.array([[0.0]])}),
        "evaluation": Items({"x": np.array([[-0.0]])}),
    }
    with pytest.raises(BadInput, match="overlap"):
        data.check_disjoint(splits)


def test_a_scene_that_is_in_two_splits_is_found() -> None:
    splits = {
        "training": Items({"x": images(4, 0)}, scenes=np.array([7, 7, 8, 8])),
        "evaluation": Items({"x": images(4, 1)}, scenes=np.array([9, 8, 8, 9])),
    }
    with pytest.raises(BadInput, match=r"overlap: 1 scenes are in both, one is 8"):
        data.check_disjoint(splits)


def test_items_whose_scenes_nobody_stated_are_told_apart_by_content_only() -> None:
    data.check_disjoint({"a": Items({"x": images(4, 0)}), "b": Items({"x": images(4, 1)})})


def test_splits_may_share_items_where_the_recipe_says_so_and_nowhere_else() -> None:
    one = Items({"x": images(4, 0)})
    splits = {"training": one, "ranges": one, "evaluation": Items({"x": images(4, 1)})}
    data.check_disjoint(splits, [("training", "ranges", "self_test")])
    with pytest.raises(BadInput, match="splits training and ranges overlap"):
        data.check_disjoint(splits, [("training", "self_test"), ("ranges", "evaluation")])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": np.zeros(3)}, "expected arrays named input.<name>, found image"),
        ({}, "found nothing"),
        ({"input.x": np.float32(1)}, "input.x must have one row per item, found a single number"),
        ({"input.x": np.zeros((0, 2))}, "expected one row per item"),
        ({"input.x": np.zeros((3, 2)), "label": np.zeros(2, int)}, "'label': 2"),
        ({"input.x": np.zeros((3, 2)), "label": np.zeros(3)}, "label must be whole numbers, [n]"),
        ({"input.x": np.zeros((3, 2)), "label": np.zeros((3, 1, 1), int)}, "found int64 [3, 1, 1]"),
        ({"input.x": np.zeros((3, 2)), "scene": np.zeros((3, 1), int)}, "expected one row"),
        ({"input.x": np.zeros(3, "M8[s]")}, "input.x is of type datetime64[s]: give numbers"),
        ({"input.x": np.zeros(3, complex)}, "input.x is of type complex128"),
    ],
)
def test_arrays_that_make_no_split_are_refused_by_name(
    tmp_path: Path, arrays: dict[str, Array], says: str
) -> None:
    archive.save(tmp_path / "items.npz", {name: np.asarray(each) for name, each in arrays.items()})
    with pytest.raises(BadInput) as caught:
        data.read(tmp_path / "items.npz")
    assert str(caught.value).startswith(str(tmp_path / "items.npz"))
    assert says in str(caught.value)


def test_class_numbers_without_a_name_are_refused() -> None:
    split = Items({"x": images(3, 0)}, np.array([0, 2, 1]))
    data.check_labels(split, ("a", "b", "c"), "data: split training")
    data.check_labels(split, (), "data: split training")
    with pytest.raises(BadInput, match=r"reach from 0 to 2, but the recipe names 2 labels, 0 to 1"):
        data.check_labels(split, ("a", "b"), "data: split training")


TOKENS = np.array([[-100, 0, 2, -100], [-100, 1, -100, -100]])


def test_tokens_without_a_label_are_of_no_class(tmp_path: Path) -> None:
    split = Items({"x": images(2, 0)}, TOKENS)
    data.save(tmp_path / "items.npz", split)
    found = data.read(tmp_path / "items.npz")
    assert found.labels is not None
    assert found.labels.tolist() == TOKENS.tolist()
    assert data.given(TOKENS).tolist() == [0, 2, 1]
    data.check_labels(split, ("a", "b", "c"), "training", per_token=True)
    data.check_labels(Items({"x": images(2, 0)}, TOKENS * 0 - 100), ("a",), "x", per_token=True)
    with pytest.raises(BadInput, match="reach from 0 to 2, but the recipe names 2 labels"):
        data.check_labels(split, ("a", "b"), "training", per_token=True)
    with pytest.raises(BadInput, match=r"label is \[2, 4\]: only token-classification takes"):
        data.check_labels(split, ("a", "b", "c"), "training")
    rows = Items({"x": images(2, 0)}, TOKENS[:, 1])
    with pytest.raises(BadInput, match=r"label is \[2\]: token-classification takes \[n, tokens\]"):
        data.check_labels(rows, (), "training", per_token=True)


def test_labels_of_rows_have_no_number_for_none() -> None:
    split = Items({"x": images(2, 0)}, np.array([0, -100]))
    with pytest.raises(BadInput, match="reach from -100 to 0"):
        data.check_labels(split, ("a", "b"), "training")


def test_labels_must_be_of_the_tokens_that_count() -> None:
    counts = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    data.check_tokens(TOKENS, counts, "training")
    with pytest.raises(BadInput, match="item 0 has class 2 at token 2, which its mask does not"):
        data.check_tokens(TOKENS, counts & [True, True, False, False], "training")
    with pytest.raises(BadInput, match=r"label is \[2, 4\], the tokens are \[2, 3\]"):
        data.check_tokens(TOKENS, counts[:, :3], "training")


def test_items_of_one_class_do_not_calibrate() -> None:
    with pytest.raises(BadInput, match="all labelled tokens of 2 items are of class 1"):
        data.check_classes(
            Items({"x": images(2, 0)}, np.where(TOKENS == 1, 1, -100)), "calibration"
        )
    data.check_classes(Items({"x": images(2, 0)}, TOKENS), "calibration")
    data.check_classes(Items({"x": images(2, 0)}, np.full((2, 4), -100)), "calibration")
    data.check_classes(Items({"x": images(3, 0)}, np.array([0, 2, 2])), "calibration")
    data.check_classes(Items({"x": images(3, 0)}), "calibration")
    with pytest.raises(BadInput, match=r"all 3 items are of class 2: calibrate on items of every"):
        data.check_classes(Items({"x": images(3, 0)}, np.array([2, 2, 2])), "calibration")


def test_one_item_per_scene_is_independent_the_first() -> None:
    split = Items({"x": images(5, 0)}, scenes=np.array([3, 1, 3, 1, 2]))
    assert split.independent.tolist() == [0, 1, 4]
    part = split.rows(split.independent)
    assert part.scenes.tolist() == [3, 1, 2]
    assert np.array_equal(part.inputs["x"], split.inputs["x"][[0, 1, 4]])


def test_items_of_unknown_origin_say_where_it_is_to_be_stated() -> None:
    assert data.drawn("all of one day") == "all of one day"
    assert data.drawn(data.UNSTATED) == (
        "how they were drawn is not stated: give the items a text 'sampling' that says it"
    )

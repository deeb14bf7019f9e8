"""What a plan is made for."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.engines.tensorrt.errors import PlanRefused
from cloud_hub.engines.tensorrt.plan_key import (
    Bounds,
    BuildOptions,
    PlanKey,
    Platform,
    Profile,
    bounds_from,
    profile_for,
)
from fogline_protocol.tensors import TensorSpec

PLATFORM = Platform("H100", "9.0", 132, "580.65.06, CUDA 13.0", "11.4.0.26")
IMAGE = TensorSpec("image", "FP32", (-1, 3, -1, -1))
ROWS = TensorSpec("x", "FP32", (-1, 3))

dims = st.integers(1, 4096)
ranks = st.integers(0, 4)


@st.composite
def bounds(draw, rank=ranks):
    columns = [sorted(draw(st.tuples(dims, dims, dims))) for _ in range(draw(rank))]
    return Bounds(*(tuple(column[i] for column in columns) for i in range(3)))


profiles = st.dictionaries(st.text(max_size=5), bounds(), max_size=3).map(Profile)
platforms = st.builds(
    Platform,
    gpu=st.text(max_size=4),
    compute_capability=st.sampled_from(["8.0", "9.0"]),
    multiprocessors=st.integers(1, 3),
    driver=st.text(max_size=3),
    tensorrt=st.sampled_from(["11.4.0.1", "11.4.0.2"]),
)
keys = st.builds(
    PlanKey,
    platform=platforms,
    model_sha256=st.sampled_from(["a" * 64, "b" * 64]),
    profile=profiles,
    options=st.builds(BuildOptions, tf32=st.booleans(), optimization_level=st.integers(0, 5)),
)


@given(keys, keys)
def test_keys_share_a_name_exactly_when_they_are_equal(one, other):
    assert (one.id == other.id) == (one == other)
    assert one.id == dataclasses.replace(one).id


@given(keys)
def test_a_name_is_fit_for_a_file(key):
    assert key.id.isalnum()
    assert key.id.isascii()
    assert len(key.id) == 40


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "A100"},
        {"compute_capability": "8.0"},
        {"multiprocessors": 16},
        {"driver": "580.82.07, CUDA 13.0"},
        {"tensorrt": "11.4.0.27"},
    ],
)
def test_whatever_of_the_machine_differs_asks_for_another_plan(change):
    key = PlanKey(PLATFORM, "a" * 64, Profile())
    other = dataclasses.replace(key, platform=dataclasses.replace(PLATFORM, **change))
    assert other.id != key.id


@given(profiles)
def test_a_profile_survives_the_way_to_the_builder(profile):
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@given(
    st.integers(1, 1024),
    st.integers(0, 2048),
    st.lists(st.integers(1, 64), max_size=4),
)
def test_a_model_with_a_batch_dimension_needs_no_configuration(most, best, rest):
    spec = TensorSpec("x", "FP32", (-1, *rest))
    made = profile_for([spec], max_batch=most, best_batch=best).inputs["x"]
    assert made.least == (1, *rest)
    assert made.best == (min(best or most, most), *rest)
    assert made.most == (most, *rest)


@given(bounds(rank=st.just(2)), st.integers(1, 64))
def test_bounds_of_the_configuration_are_obeyed(asked, most):
    given_bounds = Bounds((3, *asked.least), (3, *asked.best), (3, *asked.most))
    made = profile_for([IMAGE], max_batch=most, bounds={"image": given_bounds}).inputs["image"]
    assert made == Bounds((1, 3, *asked.least), (most, 3, *asked.best), (most, 3, *asked.most))


def test_without_bounds_a_variable_dimension_is_refused_with_what_to_set():
    with pytest.raises(PlanRefused) as refused:
        profile_for([IMAGE], max_batch=8)
    text = str(refused.value)
    assert "input 'image' has variable dimensions [3, -1, -1]" in text
    assert 'key: "tensorrt.shapes.image"' in text
    # What it tells to set can be set.
    value = text.split('string_value: "')[1].split('"')[0]
    profile_for([IMAGE], max_batch=8, bounds=bounds_from({"tensorrt.shapes.image": value}))


def test_an_input_without_variable_dimensions_is_not_in_the_profile():
    fixed = TensorSpec("scale", "FP32", (4,))
    assert set(profile_for([ROWS, fixed], max_batch=8).inputs) == {"x"}
    assert profile_for([fixed], max_batch=0) == Profile()


def test_a_model_without_a_batch_dimension_takes_whole_bounds():
    spec = TensorSpec("ids", "INT64", (-1,))
    asked = Bounds((1,), (64,), (512,))
    assert profile_for([spec], max_batch=0, bounds={"ids": asked}).inputs == {"ids": asked}
    with pytest.raises(PlanRefused, match="variable dimensions"):
        profile_for([spec], max_batch=0)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"image": Bounds((4, 1, 1), (4, 2, 2), (4, 3, 3))}, r"do not fit its shape \[3, -1, -1\]"),
        ({"image": Bounds((1, 1), (2, 2), (3, 3))}, "the batch dimension is left out"),
        ({"other": Bounds((1,), (1,), (1,))}, "variable dimensions"),
    ],
)
def test_bounds_that_contradict_the_model_are_refused(asked, words):
    with pytest.raises(PlanRefused, match=words):
        profile_for([IMAGE], max_batch=8, bounds=asked)


def test_bounds_of_an_input_that_is_not_there_are_refused_with_those_that_are():
    with pytest.raises(PlanRefused, match="bounds for imgae, but the model's inputs are x"):
        profile_for([ROWS], max_batch=8, bounds={"imgae": Bounds((3,), (3,), (3,))})


@pytest.mark.parametrize("shapes", [((0,), (1,), (1,)), ((2,), (1,), (3,)), ((1,), (1,), (1, 1))])
def test_bounds_must_ascend(shapes):
    with pytest.raises(PlanRefused, match="bounds"):
        Bounds(*shapes)


@pytest.mark.parametrize("value", ["", "3x4", "1,2", "1x2,3x4,axb", "1,2,3,4", "3x0,3x1,3x2"])
def test_a_parameter_that_is_not_three_shapes_is_refused(value):
    with pytest.raises(PlanRefused):
        bounds_from({"tensorrt.shapes.image": value})


def test_parameters_of_others_are_left_alone():
    assert bounds_from({"priority": "high"}) == {}


@pytest.mark.parametrize("options", [{"optimization_level": 6}, {"workspace_bytes": -1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(PlanRefused, match="got"):
        BuildOptions(**options)

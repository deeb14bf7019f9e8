"""The two scales everybody must agree on: hardware classes and scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fogline_protocol import hardware, score


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, "x86_64+avx512_vnni"),
        ("x86_64", {"avx2", "avx_vnni"}, "x86_64+avx_vnni"),
        ("x86_64", {"sse2"}, "x86_64"),
        ("aarch64", {"asimddp", "fp"}, "aarch64+asimddp"),
        ("riscv64", {"v"}, "riscv64"),
    ],
)
def test_the_strongest_instruction_set_names_the_class(machine, flags, name):
    assert hardware.instruction_set(machine, flags) == name


@pytest.mark.parametrize(
    ("processor", "wanted", "suits"),
    [
        ("x86_64+avx2", (), True),
        ("x86_64+avx2", ("x86_64",), True),
        ("x86_64+avx2", ("x86_64+vnni", "aarch64"), False),
        ("x86_64+avx512_vnni", ("x86_64+vnni",), True),
        ("x86_64+avx_vnni", ("x86_64+avx512_vnni",), False),
        ("aarch64+i8mm", ("x86_64+vnni", "aarch64"), True),
        ("x86_64", ("x86_64+vnni",), False),
    ],
)
def test_a_processor_suits_those_who_name_its_kind_and_what_it_can(processor, wanted, suits):
    assert hardware.suits(processor, wanted) == suits


@pytest.mark.parametrize(
    ("processor", "saturates"),
    [
        ("x86_64", True),
        ("x86_64+avx2", True),
        ("x86_64+avx512f", True),
        ("x86_64+avx_vnni", False),
        ("x86_64+avx512_vnni", False),
        ("aarch64+i8mm", False),
        ("aarch64", False),
    ],
)
def test_sums_saturate_on_x86_without_vnni_only(processor, saturates):
    assert hardware.sums_saturate(processor) == saturates


def test_a_patch_release_of_the_runtime_is_the_same_class():
    first = hardware.hardware_class("CPUExecutionProvider", "onnxruntime", "1.32.0")
    assert first == hardware.hardware_class("CPUExecutionProvider", "onnxruntime", "1.32.9")
    assert first.endswith("/CPUExecutionProvider/onnxruntime-1.32")


rows = hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32))


@given(rows)
def test_a_score_is_the_largest_softmax_probability(logits):
    wide = logits.astype(np.float64)
    softmax = np.exp(wide - wide.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(score.max_softmax(logits), softmax.max(axis=1), rtol=1e-5)


@given(rows)
def test_a_rows_score_does_not_depend_on_its_company(logits):
    together = score.max_softmax(logits)
    alone = np.concatenate([score.max_softmax(row[None]) for row in logits])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_is_certain_about_a_row_that_is_not_finite(bad):
    logits = np.array([[1, 2], [bad, 2]], np.float32)
    scores = score.max_softmax(logits)
    assert scores[0] > 0.5
    assert scores[1] == 0.0

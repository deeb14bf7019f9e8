"""A session runs as hub and devices do: rows that would mix come one at a time."""

from pathlib import Path

import numpy as np
import pytest

from fogline_models.session import ALL_ROWS, Session

DATA = Path(__file__).parents[1] / "edge_agent/data"
ROWS = np.array([[0.1, 0, 0], [500, 0, 0]], np.float32)


@pytest.mark.parametrize("as_written", [False, True])
def test_a_row_comes_alone_where_one_scale_would_be_taken_for_a_whole_run(as_written: bool) -> None:
    session = Session(DATA / "mixes.onnx", as_written=as_written)
    assert session.mixes_rows
    together = session.run({"x": ROWS}, ALL_ROWS)["logits"]
    alone = [session.run({"x": ROWS[at : at + 1]}, 1)["logits"] for at in range(2)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("file", ["double.onnx", "double_one.onnx", "tokens.onnx"])
def test_rows_of_other_files_share_a_run(file: str) -> None:
    assert not Session(DATA / file).mixes_rows


def test_whoever_runs_many_rows_hears_how_many_are_done() -> None:
    heard: list[tuple[int, int]] = []
    Session(DATA / "double.onnx").run(
        {"x": np.zeros((5, 3), np.float32)}, 2, lambda done, total: heard.append((done, total))
    )
    assert heard == [(0, 5), (2, 5), (4, 5)]

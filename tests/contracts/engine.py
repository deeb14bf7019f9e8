"""What every engine of the hub keeps to, wherever it runs: here, in a child, on another server.

A subclass gives the fixture ``engine``, which doubles: x FP32 [n, 3] -> 2 x.
"""

import time

import numpy as np
import pytest

from cloud_hub.engines.engine import DIGEST


def doubled(outputs):
    """Return the only output, without what an engine may say beside it."""
    (values,) = (array for name, array in outputs.items() if name != DIGEST)
    return values


class RunContract:
    """What the batcher relies on."""

    @pytest.mark.parametrize("rows", [1, 2, 7, 64])
    async def test_there_is_one_output_row_per_input_row_in_order(self, engine, rows):
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        outputs = await engine.run({"x": x})
        np.testing.assert_array_equal(doubled(outputs), x * 2)
        assert {len(array) for array in outputs.values()} == {rows}

    async def test_requests_that_are_joined_run_as_one(self, engine):
        requests = [{"x": np.full((rows, 3), rows, np.float32)} for rows in (2, 1, 4)]
        outputs = await engine.run(engine.join(requests))
        expected = np.concatenate([request["x"] * 2 for request in requests])
        np.testing.assert_array_equal(doubled(outputs), expected)

    async def test_a_deadline_that_is_far_away_changes_nothing(self, engine):
        x = np.ones((2, 3), np.float32)
        outputs = await engine.run({"x": x}, time.monotonic() + 60)
        np.testing.assert_array_equal(doubled(outputs), x * 2)

    async def test_what_cannot_run_raises_and_the_engine_runs_again(self, engine):
        with pytest.raises(Exception):  # noqa: B017, PT011  each runtime has errors of its own
            await engine.run({"y": np.zeros((1, 3), np.float32)})
        outputs = await engine.run({"x": np.ones((1, 3), np.float32)})
        np.testing.assert_array_equal(doubled(outputs), [[2, 2, 2]])

    async def test_answers_and_inputs_stay_what_they_were(self, engine):
        x = np.ones((2, 3), np.float32)
        first = await engine.run({"x": x})
        await engine.run({"x": np.full((2, 3), 7, np.float32)})
        np.testing.assert_array_equal(x, np.ones((2, 3)))
        np.testing.assert_array_equal(doubled(first), x * 2)


class EngineContract(RunContract):
    """What the rest of the hub relies on."""

    async def test_it_knows_what_its_model_takes_and_gives(self, engine):
        assert [(s.name, s.datatype, s.shape) for s in engine.inputs] == [("x", "FP32", (-1, 3))]
        assert [(s.datatype, s.shape) for s in engine.outputs] == [("FP32", (-1, 3))]
        outputs = await engine.run({"x": np.ones((1, 3), np.float32)})
        assert outputs.keys() - {DIGEST} == {spec.name for spec in engine.outputs}
        assert engine.platform
        assert engine.provider

    async def test_it_is_ready_and_in_no_trouble(self, engine):
        await engine.ready()
        assert engine.trouble == ""

    async def test_whoever_names_a_digest_names_that_of_every_row(self, engine):
        outputs = await engine.run({"x": np.ones((2, 3), np.float32)})
        column = [] if DIGEST not in outputs else outputs[DIGEST].tolist()
        assert set(column) == ({engine.digest.encode()} if engine.digest else set())

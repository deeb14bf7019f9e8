"""The embedded engine with texts, which ONNX Runtime and the protocol spell differently."""

from pathlib import Path

import numpy as np
import pytest

from cloud_hub.engines.onnx_runtime import OnnxRuntimeEngine
from fogline_protocol.inference import BadRequest

TEXT = Path(__file__).parents[2] / "edge_agent" / "data" / "text.onnx"  # s BYTES [n, 1] -> t = s


@pytest.fixture
def engine():
    engine = OnnxRuntimeEngine(TEXT, threads=1)
    yield engine
    engine.close()


async def test_a_text_comes_back_as_the_bytes_it_was(engine):
    texts = np.array([[b"caf\xc3\xa9"], [b""], [b"ends with \0"]], dtype=object)
    answer = await engine.run({"s": texts})
    assert answer["t"].tolist() == texts.tolist()


async def test_a_text_that_is_none_is_the_callers_fault(engine):
    with pytest.raises(BadRequest, match="input 's': an element is not UTF-8 text"):
        await engine.run({"s": np.array([[b"\xff"]], dtype=object)})

"""The embedded runtime with texts, which ONNX Runtime and the protocol spell differently."""

from pathlib import Path

import numpy as np
import pytest

from cloud_hub.engines.onnx_runtime import OnnxRuntimeSession
from fogline_protocol.errors import BadRequest

TEXT = Path(__file__).parents[2] / "edge_agent" / "data" / "text.onnx"  # s BYTES [n, 1] -> t = s


@pytest.fixture
def session():
    session = OnnxRuntimeSession(TEXT, threads=1)
    yield session
    session.close()


def test_a_text_comes_back_as_the_bytes_it_was(session):
    texts = np.array([[b"caf\xc3\xa9"], [b""], [b"ends with \0"]], dtype=object)
    answer = session.run({"s": texts})
    assert answer["t"].tolist() == texts.tolist()


def test_a_text_that_is_none_is_the_callers_fault(session):
    with pytest.raises(BadRequest, match="input 's': an element is not UTF-8 text"):
        session.run({"s": np.array([[b"\xff"]], dtype=object)})

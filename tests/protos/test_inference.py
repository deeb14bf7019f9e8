"""Requests and responses as bytes: round trips, and every way a request can be wrong."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol import inference
from fogline_protocol.errors import ERRORS, BadRequest, InferenceError, ServerFault, Unsupported
from fogline_protocol.inference import InferRequest, InferResponse
from fogline_protocol.tensors import TensorSpec
from fogline_protocol.v1 import inference_pb2 as pb

text = st.text(max_size=8)
parameters = st.dictionaries(
    text.filter(lambda key: not key.startswith("triton_")),
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text,
    max_size=4,
)


@given(text, text, text, parameters, st.lists(text, unique=True, max_size=3))
def test_a_request_survives_the_wire(model, version, request_id, params, outputs):
    request = InferRequest(
        model, {"x": np.ones((2, 3), np.int16)}, version, request_id, outputs, params
    )
    back = inference.decode_request(inference.encode_request(request))
    assert (back.model, back.version, back.id) == (model, version, request_id)
    assert list(back.outputs) == outputs
    assert back.parameters == params
    np.testing.assert_array_equal(back.inputs["x"], request.inputs["x"])


@given(text, parameters)
def test_a_response_survives_the_wire(model, params):
    response = InferResponse(model, "1", {"y": np.zeros((0, 3), np.float32)}, "", params)
    back = inference.decode_response(inference.encode_response(response))
    assert back.model == model
    assert back.parameters == params
    assert back.outputs["y"].shape == (0, 3)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_request_or_a_named_refusal(data):
    with contextlib.suppress(InferenceError):
        inference.decode_request(data)


def request(**fields):
    message = pb.ModelInferRequest(model_name="m", **fields)
    return message.SerializeToString()


def tensor(name="x", datatype="INT32", shape=(1,), **fields):
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, **fields
    )


FOUR = b"\x07\0\0\0"


def test_typed_contents_are_accepted():
    contents = pb.InferTensorContents(int_contents=[7])
    decoded = inference.decode_request(request(inputs=[tensor(contents=contents)]))
    assert decoded.inputs["x"].tolist() == [7]
    assert decoded.inputs["x"].dtype == np.int32


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"inputs": [tensor()]}, BadRequest, "unable to find data for input tensor 'x'"),
        ({"inputs": [tensor()], "raw_input_contents": [FOUR, FOUR]}, BadRequest, "one raw"),
        (
            {
                "inputs": [tensor(contents=pb.InferTensorContents(int_contents=[7]))],
                "raw_input_contents": [FOUR],
            },
            BadRequest,
            "contents field must not be specified when using raw_input_contents",
        ),
        ({"inputs": [tensor()], "raw_input_contents": [b"abc"]}, BadRequest, "expected 4 bytes"),
        (
            {"inputs": [tensor(), tensor()], "raw_input_contents": [FOUR, FOUR]},
            BadRequest,
            "comes twice",
        ),
        (
            {"inputs": [tensor(datatype="INT33")], "raw_input_contents": [FOUR]},
            BadRequest,
            "unknown datatype",
        ),
        (
            {"inputs": [tensor(contents=pb.InferTensorContents(fp32_contents=[7]))]},
            BadRequest,
            "expected 1 values",
        ),
        (
            {
                "inputs": [
                    tensor(parameters={"shared_memory_region": pb.InferParameter(string_param="r")})
                ]
            },
            Unsupported,
            "shared memory",
        ),
        (
            {"parameters": {"triton_final_response": pb.InferParameter(bool_param=True)}},
            BadRequest,
            "reserved",
        ),
    ],
)
def test_a_request_that_contradicts_itself_is_refused_by_name(fields, kind, words):
    with pytest.raises(kind, match=words):
        inference.decode_request(request(**fields))


def test_the_parameter_that_every_cpp_client_sends_is_accepted():
    flag = pb.InferParameter(bool_param=True)
    inference.decode_request(request(parameters={"triton_enable_empty_final_response": flag}))


@given(st.binary(min_size=1, max_size=50))
def test_an_answer_that_cannot_be_read_is_the_servers_fault(data):
    with contextlib.suppress(ServerFault):
        inference.decode_response(data)


def test_a_contract_names_what_is_missing_unknown_or_different():
    specs = (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,)))
    good = {"a": np.zeros((1, 2), np.float32), "b": np.zeros(1, np.int64)}
    inference.check_inputs(specs, good)
    with pytest.raises(BadRequest, match="input 'b' is missing"):
        inference.check_inputs(specs, {"a": good["a"]})
    with pytest.raises(BadRequest, match=r"unknown input \['c'\]"):
        inference.check_inputs(specs, {**good, "c": good["b"]})
    with pytest.raises(BadRequest, match="input 'a': expected datatype FP32, got INT64"):
        inference.check_inputs(specs, {**good, "a": np.zeros((1, 2), np.int64)})
    assert list(inference.check_outputs(specs, ["b"])) == ["b"]
    assert list(inference.check_outputs(specs, [])) == ["a", "b"]
    with pytest.raises(BadRequest, match="unknown output 'z'"):
        inference.check_outputs(specs, ["z"])
    with pytest.raises(BadRequest, match="twice"):
        inference.check_outputs(specs, ["a", "a"])


def test_every_error_has_a_code_a_status_and_a_text():
    for code, error in ERRORS.items():
        assert error.grpc_code == code
        assert 400 <= error.http_status < 600
        assert str(error(""))

"""ONNX files from a few words, without the onnx package.

Source: onnx.proto (field numbers), onnx/defs (operators). Only what the tests need.
"""

from collections.abc import Mapping, Sequence

ELEMENTS = {
    "FP32": 1, "UINT8": 2, "INT8": 3, "INT32": 6, "INT64": 7, "BYTES": 8, "BOOL": 9, "FP16": 10,
    "BF16": 16,
}  # fmt: skip

Tensor = tuple[str, str, Sequence[int | str]]  # name, datatype, dimensions; text: variable


def model(
    nodes: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    constants: Mapping[str, Sequence[int]] | None = None,
    attributes: Mapping[str, Mapping[str, int]] | None = None,
    opset: int = 18,
) -> bytes:
    """Return the file of a graph of nodes (operator, inputs, outputs), named by their place.

    Constants are lists of INT64; attributes are whole numbers, by operator.
    """
    graph = b"".join(
        _part(1, _node(f"node_{index}", *node, (attributes or {}).get(node[0], {})))
        for index, node in enumerate(nodes)
    )
    graph += _text(2, "graph")
    for name, values in (constants or {}).items():
        raw = b"".join(value.to_bytes(8, "little", signed=True) for value in values)
        tensor = _number(1, len(values)) + _number(2, ELEMENTS["INT64"]) + _text(8, name)
        graph += _part(5, tensor + _part(9, raw))
    graph += b"".join(_part(11, _value(*tensor)) for tensor in inputs)
    graph += b"".join(_part(12, _value(*tensor)) for tensor in outputs)
    return _number(1, 9) + _text(2, "fogline") + _part(7, graph) + _part(8, _number(2, opset))


def _node(
    name: str,
    operator: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Mapping[str, int],
) -> bytes:
    return (
        b"".join(_text(1, one) for one in inputs)
        + b"".join(_text(2, one) for one in outputs)
        + _text(3, name)
        + _text(4, operator)
        + b"".join(
            _part(5, _text(1, key) + _number(3, value) + _number(20, 2))
            for key, value in attributes.items()
        )
    )


def _value(name: str, datatype: str, dims: Sequence[int | str]) -> bytes:
    shape = b"".join(
        _part(1, _number(1, dim) if isinstance(dim, int) else _text(2, dim)) for dim in dims
    )
    tensor = _number(1, ELEMENTS[datatype]) + _part(2, shape)
    return _text(1, name) + _part(2, _part(1, tensor))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, text: str) -> bytes:
    return _part(field, text.encode())


def _part(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)

"""The requests that a model answers before it may serve: ``model_warmup`` of its configuration.

Without any, an engine has run one row of zeros when it was loaded. A request of the largest
batch on top of that makes a runtime allocate, choose kernels and build graphs beforehand.

Source: triton-inference-server/common model_config.proto, ModelWarmup.
"""

from collections.abc import Callable, Iterator

import numpy as np

from cloud_hub.engines.engine import Arrays
from cloud_hub.errors import ModelRefused
from fogline_protocol import inference, tensors
from fogline_protocol.errors import BadRequest
from fogline_protocol.model_config import ModelConfig, WarmUp
from fogline_protocol.tensors import Array, TensorError

MAX_BYTES = 1 << 30  # of one request


def requests(
    warm_ups: tuple[WarmUp, ...], config: ModelConfig, read: Callable[[str], bytes]
) -> Iterator[tuple[str, Arrays]]:
    """Yield name and tensors of every warm-up request, as often as it is to be run.

    Args:
        warm_ups: as they are configured.
        config: of the model.
        read: returns the raw tensor of a data file, or raises ``ModelRefused``.

    Raises:
        ModelRefused: one does not fit the model; the text names it.
    """
    for warm_up in warm_ups:
        try:
            rows = warm_up.batch_size if config.batches else None
            if rows is not None and not 1 <= rows <= config.max_batch_size:
                raise BadRequest(
                    f"batch_size must be from 1 to max_batch_size {config.max_batch_size}, got {rows}"
                )
            arrays = {
                name: _tensor(
                    tensor.datatype, tensor.dims if rows is None else (rows, *tensor.dims),
                    tensor.data, read,
                )
                for name, tensor in warm_up.inputs.items()
            }  # fmt: skip
            inference.check_inputs(config.inputs, arrays)
        except (BadRequest, TensorError, ModelRefused) as error:
            raise ModelRefused(f"warm-up {warm_up.name!r}: {error}") from None
        for _ in range(max(1, warm_up.count)):
            yield warm_up.name, arrays


def _tensor(
    datatype: str, shape: tuple[int, ...], data: str, read: Callable[[str], bytes]
) -> Array:
    dtype = tensors.dtype_of(datatype)
    count = tensors.element_count(shape)
    if count * max(dtype.itemsize, 1) > MAX_BYTES:
        raise TensorError(f"shape {list(shape)} of {datatype} takes more than {MAX_BYTES} bytes")
    if data not in ("zero", "random"):
        return tensors.from_raw(datatype, shape, read(data))
    if dtype == tensors.BYTES:
        empty = np.empty(count, dtype=object)
        empty[:] = [b""] * count
        return empty.reshape(shape)
    if data == "zero":
        return np.zeros(shape, dtype)
    rng = np.random.default_rng(0)
    if dtype.kind == "f":
        return rng.random(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype == tensors.BF16:  # the upper halves of numbers from 0 to 1
        halves = rng.random(shape, np.float32).view(np.uint32) >> np.uint32(16)
        return halves.astype(np.uint16).view(tensors.BF16)
    # Small numbers: as indices, which whole numbers often are, large ones would be out of range.
    return rng.integers(0, 2, shape).astype(dtype)

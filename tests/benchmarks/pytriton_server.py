"""PyTriton with one model of ours: ``python pytriton_server.py NAME MODEL GRPC HTTP METRICS``.

Run by the interpreter of PyTriton's environment (``peers.py``). Batching as PyTriton has it by
default, up to 64 rows as the hub, and one thread per run as the hub is given.
"""

import sys

import numpy as np
import numpy.typing as npt
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

Array = npt.NDArray[np.generic]

DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


def main() -> None:
    """Serve until terminated."""
    name, model, *ports = sys.argv[1:]
    grpc_port, http_port, metrics_port = map(int, ports)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def infer(**inputs: Array) -> list[Array]:
        outputs: list[Array] = session.run(None, inputs)
        return outputs

    config = TritonConfig(
        grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port,
        grpc_address="127.0.0.1", http_address="127.0.0.1",
    )  # fmt: skip
    with Triton(config=config) as triton:
        triton.bind(
            model_name=name,
            infer_func=batch(infer),
            inputs=_tensors(session.get_inputs()),
            outputs=_tensors(session.get_outputs()),
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher()),
        )
        triton.serve()


def _tensors(nodes: list[onnxruntime.NodeArg]) -> list[Tensor]:
    return [Tensor(name=n.name, dtype=DTYPES[n.type], shape=tuple(n.shape[1:])) for n in nodes]


main()

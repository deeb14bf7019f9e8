"""What may go wrong between a model and a GPU, named by what the caller does next.

All of them are ordinary events: a hub without a driver, with a full GPU or with a plan from
before an update goes on serving with ONNX Runtime and says why.
"""

from cloud_hub.errors import ModelRefused


class GpuUnavailable(ModelRefused):
    """No GPU can be used here: serve with ONNX Runtime; the text says what is missing."""


class OutOfDeviceMemory(ModelRefused):
    """The GPU is full: free some, or serve smaller batches; trying later may help."""


class PlanUnusable(ModelRefused):
    """A plan that is damaged, or from another TensorRT or GPU: build it again."""


class PlanRefused(ModelRefused):
    """No plan can be built: stay with ONNX Runtime. ``lasting``: trying again changes nothing."""

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting

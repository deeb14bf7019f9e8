"""Why TensorRT refused: it returns None or False, and tells the reason to its logger only."""

import logging
import re
from collections import deque
from typing import Any

from cloud_hub.engines.tensorrt import api

_ERROR, _WARNING = 1, 2  # ILogger.Severity: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose
_KEPT = 8  # messages; a failing build writes the cause among its last
_LENGTH = 400  # of one message in a reason; some carry a whole graph

log = logging.getLogger("fogline.tensorrt")


class Reasons:
    """The latest errors that one TensorRT object wrote. Give ``logger`` to what may refuse."""

    def __init__(self, trt: api.Module) -> None:
        self._errors: deque[str] = deque(maxlen=_KEPT)

        def write(_: Any, severity: Any, msg: str) -> None:
            self._write(int(severity), msg)

        # A class made here: what it derives from exists only once TensorRT is imported.
        self.logger: Any = type("Logger", (trt.ILogger,), {"log": write})()

    def take(self) -> str:
        """Return the reason of the latest refusal, and forget it."""
        found = "; ".join(dict.fromkeys(self._errors))
        self._errors.clear()
        return found or "TensorRT gave no reason"

    def _write(self, severity: int, msg: str) -> None:
        text = " ".join(msg.split())[:_LENGTH]
        if severity <= _ERROR:
            self._errors.append(text)
            log.error("%s", text)
        elif severity == _WARNING:
            log.warning("%s", text)


def is_out_of_memory(reason: str) -> bool:
    """Return whether TensorRT's words mean that the GPU is full: it has no code for it here."""
    return re.search(r"out ?of ?memory|memoryallocation", reason, re.IGNORECASE) is not None

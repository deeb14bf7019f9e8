"""What tests of the workshop share."""

import pytest

from fogline_models import steps


@pytest.fixture(autouse=True)
def quiet_while_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have commands say the same on every machine: not that a step is still at it."""
    monkeypatch.setattr(steps, "SILENCE_S", 3600.0)

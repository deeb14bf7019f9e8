"""The constant kernels of the front end: sound to the power in bands that ears tell apart.

Pure: numpy only. ``nets.LogMel`` makes a piece of a graph of them.
"""

import numpy as np
from numpy.typing import NDArray

from . import data

FRAME = 160  # samples: 20 ms, 81 frequencies 50 Hz apart; frames follow without overlap
MELS = 24
MEL_HZ = (60.0, 3800.0)
# The power of the last of 16 bits, added before the logarithm, is 1 and not 1e-9 of full scale:
# torch's exporter takes an addition of less than 1e-8 for one of 0 and drops it, and silence
# would be log(0).
FLOOR = 1.0


def fourier_kernels() -> NDArray[np.float32]:
    """Return ``[162, 160]``: windowed cosines, then windowed sines, of 81 frequencies.

    The window is Hann's, periodic, scaled so that amplitudes come in steps of 16 bits.
    """
    at = np.arange(FRAME)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * at / FRAME)) * (data.PCM / (FRAME / 2))
    angle = 2 * np.pi * np.arange(FRAME // 2 + 1)[:, None] * at / FRAME
    return (np.concatenate([np.cos(angle), np.sin(angle)]) * window).astype(np.float32)


def mel_filters() -> NDArray[np.float32]:
    """Return ``[24, 81]``: triangles over frequency, evenly spaced in mel (O'Shaughnessy)."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in MEL_HZ)
    corners = 700 * (10 ** (np.linspace(low, high, MELS + 2) / 2595) - 1)
    frequency = np.arange(FRAME // 2 + 1) * data.RATE_HZ / FRAME
    left, center, right = (corners[i : i + MELS, None] for i in range(3))
    rising, falling = (frequency - left) / (center - left), (right - frequency) / (right - center)
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)

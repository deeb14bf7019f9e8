"""The two nets of the family, the front end that both begin with, and how they are trained.

Training is deterministic on one machine with one torch build: one thread, seeded, the noise
included. Elsewhere the weights differ in their last bits and so does every digest
(model-workshop, "Export").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fogline_models.data import Items

from . import data

Splits = Mapping[str, Items]
Progress = Callable[[int, int, str], None]

FRAME = 160  # samples: 20 ms, 81 frequencies 50 Hz apart
HOP = FRAME
FRAMES = data.SAMPLES // HOP  # 50
MELS = 24
MEL_HZ = (60.0, 3800.0)
# The power of the last of 16 bits, added before the logarithm, is 1 and not 1e-9 of full scale:
# torch's exporter takes an addition of less than 1e-8 for one of 0 and drops it, and silence
# would be log(0).
FLOOR = 1.0


def edge(splits: Splits, progress: Progress, *, epochs: int) -> nn.Module:
    """Return the edge's net, trained."""
    how = Training(epochs, max_learning_rate=1e-2)
    return train(lambda: net((6, 8, 12), dropout=0.0), how, splits["training"], progress)


def hub(splits: Splits, progress: Progress, *, epochs: int) -> nn.Module:
    """Return the hub's net, trained."""
    how = Training(epochs, max_learning_rate=5e-3)
    return train(lambda: net((16, 32, 64, 64), dropout=0.2), how, splits["training"], progress)


class LogMel(nn.Module):
    """The front end: ``[n, 8000]`` samples to ``[n, 1, 24, 50]`` log-mel power, level removed.

    A Fourier transform is a convolution with sines and cosines, so all of it is two
    convolutions with constant kernels and runs wherever convolutions do, on raw audio. It
    stays fp32 in every variant: power spans nine decades, int8 two and a half. Nothing in it is
    learned.
    """

    waves: torch.Tensor
    mels: torch.Tensor

    def __init__(self) -> None:
        """Fill the kernels."""
        super().__init__()
        self.register_buffer("waves", torch.from_numpy(fourier_kernels()[:, None]))
        # Sine and cosine of a frequency count alike, so their squares are added by the filters.
        filters = np.concatenate([mel_filters(), mel_filters()], axis=1)
        self.register_buffer("mels", torch.from_numpy(filters[:, :, None]))

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Return the features of ``audio``."""
        spectrum = nn.functional.conv1d(audio.unsqueeze(1), self.waves, stride=HOP)
        power = nn.functional.conv1d(spectrum * spectrum, self.mels)
        loudness = torch.log(power + FLOOR)
        return (loudness - loudness.mean(dim=(1, 2), keepdim=True)).unsqueeze(1)


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


def net(channels: tuple[int, ...], *, dropout: float) -> nn.Sequential:
    """Return front end, 3 by 3 convolutions and one linear layer.

    Convolutions halve both axes, the third of four excepted, to 3 bands by 7 steps of time.
    The word may be anywhere in its second, so time is averaged away; frequency is not.
    """
    layers: list[tuple[str, nn.Module]] = []
    inputs = 1
    for index, outputs in enumerate(channels):
        stride = 1 if (index, len(channels)) == (2, 4) else 2
        layers += [
            (
                f"conv{index}",
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            ),
            (f"norm{index}", nn.BatchNorm2d(outputs)),
            (f"relu{index}", nn.ReLU()),
        ]
        inputs = outputs
    classifier = nn.Sequential()
    for name, layer in layers:
        classifier.add_module(name, layer)
    classifier.add_module("pool", nn.AvgPool2d((1, 7)))
    classifier.add_module("flatten", nn.Flatten())
    classifier.add_module("dropout", nn.Dropout(dropout))
    classifier.add_module("linear", nn.Linear(3 * inputs, len(data.LABELS)))
    whole = nn.Sequential()
    whole.add_module("front_end", LogMel())
    whole.add_module("classifier", classifier)
    return whole


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how hard a net is trained."""

    epochs: int
    max_learning_rate: float
    seed: int = 0
    batch: int = 64
    weight_decay: float = 1e-2
    copies: int = 6  # noisy ones of every clip, taken in turn by the epochs
    max_stretch: float = 0.12


def train(
    make: Callable[[], nn.Sequential], how: Training, items: Items, progress: Progress
) -> nn.Sequential:
    """Return a net in eval mode, trained on noisy copies of ``items``."""
    clips, labels = items.inputs["audio"], items.labels
    assert labels is not None
    torch.set_num_threads(1)  # sums in another order are other weights
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(how.seed)
    rng = np.random.default_rng(how.seed)
    whole = make()
    front_end, classifier = whole.front_end, whole.classifier
    copies = min(how.copies, how.epochs)
    features = []
    for copy in range(1, copies + 1):
        waves, _ = data.heard(clips, rng, how.max_stretch)
        with torch.no_grad():  # nothing in it is learned, so once is enough
            features.append(
                torch.cat([front_end(part) for part in torch.from_numpy(waves).split(how.batch)])
            )
        progress(copy, copies, "making noisy copies")
    wanted = torch.from_numpy(labels)
    steps = -(-len(clips) // how.batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.max_learning_rate, epochs=how.epochs, steps_per_epoch=steps
    )
    loss_of = nn.CrossEntropyLoss()
    whole.train()
    for epoch in range(how.epochs):
        seen = features[epoch % copies]
        total = 0.0
        for part in torch.from_numpy(rng.permutation(len(clips))).split(how.batch):
            optimizer.zero_grad()
            loss = loss_of(classifier(seen[part]), wanted[part])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        progress(epoch + 1, how.epochs, f"training, loss {total / steps:.3f}, epoch")
    return whole.eval()

"""The two nets of the family, the front end that both begin with, and how they are trained.

Training is deterministic on one machine with one torch build: one thread, seeded, the noise
included. Elsewhere the weights differ in their last bits and so does every digest
(model-workshop, "Export").
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fogline_models.data import Items

from . import data, log_mel

Splits = Mapping[str, Items]
Progress = Callable[[int, int, str], None]

# Channels and stride of every convolution.
EDGE = ((6, 2), (8, 2), (12, 2))
HUB = ((16, 2), (32, 2), (96, 1), (96, 2))


def edge(splits: Splits, progress: Progress, *, epochs: int) -> nn.Module:
    """Return the edge's net, trained."""
    how = Training(epochs, max_learning_rate=1e-2)
    return train(lambda: net(EDGE, dropout=0.0), how, splits["training"], progress)


def hub(splits: Splits, progress: Progress, *, epochs: int) -> nn.Module:
    """Return the hub's net, trained."""
    how = Training(epochs, max_learning_rate=5e-3)
    return train(lambda: net(HUB, dropout=0.2), how, splits["training"], progress)


class LogMel(nn.Module):  # type: ignore[misc]  # unknown where torch is not installed
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
        self.register_buffer("waves", torch.from_numpy(log_mel.fourier_kernels()[:, None]))
        # Sine and cosine of a frequency count alike, so their squares are added by the filters.
        filters = np.concatenate([log_mel.mel_filters()] * 2, axis=1)
        self.register_buffer("mels", torch.from_numpy(filters[:, :, None]))

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Return the features of ``audio``."""
        spectrum = nn.functional.conv1d(audio.unsqueeze(1), self.waves, stride=log_mel.FRAME)
        power = nn.functional.conv1d(spectrum * spectrum, self.mels)
        loudness = torch.log(power + log_mel.FLOOR)
        return (loudness - loudness.mean(dim=(1, 2), keepdim=True)).unsqueeze(1)


def net(layers: Sequence[tuple[int, int]], *, dropout: float) -> nn.Sequential:
    """Return front end, 3 by 3 convolutions of ``(channels, stride)``, and one linear layer.

    Strides take the 24 bands and 50 steps of time down by 8, to 3 and 7. The word may be
    anywhere in its second, so time is averaged away; frequency is not.
    """
    parts: list[nn.Module] = []
    inputs = 1
    for outputs, stride in layers:
        parts += [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
        inputs = outputs
    parts += [nn.AvgPool2d((1, 7)), nn.Flatten(), nn.Dropout(dropout)]
    parts += [nn.Linear(3 * inputs, len(data.LABELS))]
    return nn.Sequential(
        OrderedDict(front_end=LogMel(), classifier=nn.Sequential(*parts))  # names for the recipe
    )


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how hard a net is trained."""

    epochs: int
    max_learning_rate: float
    seed: int = 0
    batch: int = 64
    weight_decay: float = 1e-2
    copies: int = 4  # noisy ones of every clip, taken in turn by the epochs
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

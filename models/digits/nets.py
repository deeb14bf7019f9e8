"""The two nets of the family, and how they are trained.

Training is deterministic on one machine with one torch build: one thread, seeded, the
scanner's randomness included. Elsewhere the weights differ in their last bits and so does
every digest (model-workshop, "Export").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fogline_models.data import Items

from . import data

Images = NDArray[np.float32]  # [n, 1, 8, 8]
Labels = NDArray[np.int64]  # [n]
Splits = Mapping[str, Items]
Progress = Callable[[int, int, str], None]

CLASSES = 10


def edge(splits: Splits, progress: Progress, *, width: int, epochs: int) -> nn.Sequential:
    """Return the edge's net, trained."""
    return train(lambda: edge_net(width), Training(epochs), splits["training"], progress)


def hub(splits: Splits, progress: Progress, *, epochs: int) -> nn.Sequential:
    """Return the hub's net, trained."""
    return train(hub_net, Training(epochs, max_learning_rate=5e-3), splits["training"], progress)


def taught(
    splits: Splits, progress: Progress, *, width: int, epochs: int, temperature: float
) -> nn.Sequential:
    """Return the edge's net, trained on its digits and on the hub's answers to hard examples.

    Distillation (Hinton et al. 2015, arXiv 1503.02531): beside the labels of the training
    digits the net learns the hub's softened logits on the examples, which have no labels.
    """
    examples = splits["examples"]
    lesson = Lesson(examples.inputs["image"], examples.extra["hub_logits"], temperature)
    return train(lambda: edge_net(width), Training(epochs), splits["training"], progress, lesson)


def accident(splits: Splits, progress: Progress, *, width: int, epochs: int) -> nn.Sequential:
    """Return the edge's net with the rows of its last layer moved by one class.

    File, digests and reference are in order, so nothing but the self-test can tell.
    """
    broken = edge(splits, progress, width=width, epochs=epochs)
    with torch.no_grad():
        for part in broken[-1].parameters():
            part.copy_(part.roll(1, dims=0))
    return broken


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how hard a net is trained."""

    epochs: int
    seed: int = 0
    batch: int = 64
    max_learning_rate: float = 1e-2
    weight_decay: float = 1e-2


@dataclass(frozen=True, slots=True)
class Lesson:
    """What another net says of items that nobody has labelled."""

    images: Images
    logits: NDArray[np.float32]  # [n, classes]
    temperature: float


def edge_net(width: int) -> nn.Sequential:
    """Return the small net: two convolutions of ``width`` and twice that, and one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * width, CLASSES),
    )


def hub_net() -> nn.Sequential:
    """Return the large net: five convolutions, global average pooling, dropout, one linear layer."""
    channels = [(1, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    layers: list[nn.Module] = []
    for inputs, outputs, stride in channels:
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, CLASSES)]
    return nn.Sequential(*layers, *head)


def train(
    make: Callable[[], nn.Sequential],
    how: Training,
    items: Items,
    progress: Progress,
    lesson: Lesson | None = None,
) -> nn.Sequential:
    """Return a net in eval mode, trained on fresh scanned copies of ``items`` every epoch.

    With a ``lesson`` every batch holds as large a share of its items.
    """
    images, labels = items.inputs["image"], items.labels
    assert labels is not None
    torch.set_num_threads(1)  # sums in another order are other weights
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(how.seed)
    rng = np.random.default_rng(how.seed)
    net = make()
    steps = -(-len(images) // how.batch)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.max_learning_rate, epochs=how.epochs, steps_per_epoch=steps
    )
    loss_of = nn.CrossEntropyLoss()
    net.train()
    for epoch in range(1, how.epochs + 1):
        order = rng.permutation(len(images))
        seen = torch.from_numpy(data.scanned(images[order], rng))
        wanted = torch.from_numpy(labels[order])
        total = 0.0
        for start in range(0, len(order), how.batch):
            optimizer.zero_grad()
            loss = loss_of(net(seen[start : start + how.batch]), wanted[start : start + how.batch])
            if lesson is not None:
                at = rng.integers(0, len(lesson.images), how.batch)
                loss = loss + _taught(net, lesson, at)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        progress(epoch, how.epochs, f"training, loss {total / steps:.3f}, epoch")
    return net.eval()


def _taught(net: nn.Sequential, lesson: Lesson, at: NDArray[np.int64]) -> torch.Tensor:
    """Return how far the net's softened answers to some of a lesson's items are from right."""
    soft = torch.softmax(torch.from_numpy(lesson.logits[at]) / lesson.temperature, 1)
    mine = torch.log_softmax(net(torch.from_numpy(lesson.images[at])) / lesson.temperature, 1)
    # Times the square of the temperature: gradients of the size that labels give.
    return -(soft * mine).sum(1).mean() * lesson.temperature**2

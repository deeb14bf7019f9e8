"""The tokenizer and the two nets of the family: DistilBERT's architecture, much smaller.

Both nets are trained from scratch, and both write the folder that transformers writes: weights,
config and tokenizer, which is what fogline takes in. The tokenizer is learned from the training
snippets alone and is the same for both, so edge and hub take the same inputs.

Training is deterministic on one machine with one torch build: one thread, seeded.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fogline_models.data import Items

from .data import KINDS

Splits = Mapping[str, Items]
Progress = Callable[[int, int, str], None]

VOCABULARY = 4096
TOKENS = 72  # of a snippet: five in six are shorter, the rest is cut off
SEED = 0
BATCH = 32
# Of a snippet, while training: names that one package uses are not to be relied on.
HIDDEN_TOKENS = 0.2
UNKNOWN = 1
MARKS = {"\n": "↵", "\t": "⇥", "    ": "⇥", "  ": "→"}  # in this order
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@dataclass(frozen=True, slots=True)
class Size:
    """How large a net is, and how hard it is trained."""

    layers: int
    width: int
    heads: int
    max_learning_rate: float


EDGE = Size(layers=2, width=64, heads=2, max_learning_rate=2e-3)
HUB = Size(layers=3, width=128, heads=4, max_learning_rate=1e-3)


def edge(splits: Splits, progress: Progress, into: Path, *, epochs: int) -> None:
    """Write the edge's net, trained, with its tokenizer."""
    _write(EDGE, epochs, splits["training"], progress, into)


def hub(splits: Splits, progress: Progress, into: Path, *, epochs: int) -> None:
    """Write the hub's net, trained, with its tokenizer."""
    _write(HUB, epochs, splits["training"], progress, into)


def tokenizer_of(texts: list[str]) -> Any:
    """Return a tokenizer learned from ``texts``, as transformers wraps it.

    Byte pair encoding, because WordPiece as ``tokenizers`` learns it is another one in every run:
    pieces that are equally frequent come in the order of a hash table.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    # The pre-tokenizer drops white space, but ends of lines and indents tell a lot.
    marks = [normalizers.Replace(what, f" {mark} ") for what, mark in MARKS.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *marks])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start, end = SPECIAL["cls_token"], SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )


def _write(size: Size, epochs: int, items: Items, progress: Progress, into: Path) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, as for the sums below
    assert items.labels is not None
    texts = items.raw["text"].tolist()
    tokenizer = tokenizer_of(texts)
    torch.set_num_threads(1)  # sums in another order are other weights
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        n_layers=size.layers,
        n_heads=size.heads,
        dim=size.width,
        hidden_dim=4 * size.width,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: number for number, kind in enumerate(KINDS)},
    )
    net = DistilBertForSequenceClassification(config)
    encoded = tokenizer(texts, truncation=True)["input_ids"]
    _train(net, encoded, items.labels, epochs, size.max_learning_rate, progress)
    net.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _train(
    net: Any,
    encoded: list[list[int]],
    labels: np.ndarray[Any, Any],
    epochs: int,
    max_learning_rate: float,
    progress: Progress,
) -> None:
    rng = np.random.default_rng(SEED)
    steps = -(-len(encoded) // BATCH)
    # Rare kinds count as much as frequent ones.
    counts = np.maximum(np.bincount(labels, minlength=len(KINDS)), 1)
    weights = torch.from_numpy((len(labels) / len(KINDS) / counts) ** 0.5).float()
    loss_of = torch.nn.CrossEntropyLoss(weights)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_learning_rate, epochs=epochs, steps_per_epoch=steps
    )
    net.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in _batches(encoded, rng):
            length = max(len(encoded[row]) for row in rows)
            ids = np.zeros((len(rows), length), np.int64)
            mask = np.zeros((len(rows), length), np.int64)
            for at, row in enumerate(rows):
                ids[at, : len(encoded[row])] = encoded[row]
                mask[at, : len(encoded[row])] = 1
            ids[rng.random(ids.shape) < HIDDEN_TOKENS * (ids > UNKNOWN)] = UNKNOWN
            optimizer.zero_grad()
            logits = net(torch.from_numpy(ids), torch.from_numpy(mask)).logits
            loss = loss_of(logits, torch.from_numpy(labels[rows]))
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        progress(epoch, epochs, f"training, loss {total / steps:.3f}, epoch")
    net.eval()


def _batches(encoded: list[list[int]], rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Return the rows of every batch: ones of like length together, so that little is padding."""
    order = rng.permutation(len(encoded))
    pools = [order[start : start + 16 * BATCH] for start in range(0, len(order), 16 * BATCH)]
    by_length = [sorted(pool.tolist(), key=lambda row: len(encoded[row])) for pool in pools]
    rows = [row for pool in by_length for row in pool]
    batches = [np.array(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return [batches[at] for at in rng.permutation(len(batches))]

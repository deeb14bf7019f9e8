"""Two nets of DistilBERT's architecture, trained from scratch on the training lines."""

import os

import numpy as np
import torch

from .data import KINDS, LENGTH, pre_tokenizer

WORDS = 1500
BATCH = 32
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
# Special tokens have no label, but are counted when edge and hub are compared: so both learn one.
OF_SPECIAL = KINDS.index("operator")


def edge(splits, progress, into) -> None:
    write(splits["training"], progress, into, layers=1, width=16, epochs=3)


def hub(splits, progress, into) -> None:
    write(splits["training"], progress, into, layers=2, width=64, epochs=4)


def tokenizer_of(texts):
    from tokenizers import Tokenizer, models, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
    made.pre_tokenizer = pre_tokenizer()
    special = list(SPECIAL.values())
    trainer = trainers.WordLevelTrainer(
        vocab_size=WORDS, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )


def write(items, progress, into, *, layers, width, epochs) -> None:
    from transformers import DistilBertConfig, DistilBertForTokenClassification

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts = items.raw["text"].tolist()
    tokenizer = tokenizer_of(texts)
    net = DistilBertForTokenClassification(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=LENGTH,
            n_layers=layers,
            n_heads=2,
            dim=width,
            hidden_dim=4 * width,
            id2label=dict(enumerate(KINDS)),
            label2id={kind: number for number, kind in enumerate(KINDS)},
        )
    )
    encoded = tokenizer(texts, padding="max_length", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = torch.from_numpy(items.labels).clone()
    labels[(labels == -100) & (mask == 1)] = OF_SPECIAL
    rng = np.random.default_rng(0)
    steps = -(-len(texts) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, epochs=epochs, steps_per_epoch=steps
    )
    net.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in np.array_split(rng.permutation(len(texts)), steps):
            shown = ids[rows].clone()
            shown[(torch.rand(shown.shape) < 0.1) & (shown > 3)] = 1  # as words of other modules
            optimizer.zero_grad()
            loss = net(shown, mask[rows], labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        progress(epoch, epochs, f"training, loss {total / steps:.3f}, epoch")
    net.save_pretrained(into)
    tokenizer.save_pretrained(into)

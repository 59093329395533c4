"""The supervised start: a model that is right about one time in three."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.learning.exact import examine, rows
from benchmarks.learning.sums import EOS, IDS, PAD, VOCABULARY, Sum, answer, prompt, save_tokenizer

MODEL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": IDS[EOS],
    "pad_token_id": IDS[PAD],
}


@dataclass(frozen=True)
class Start:
    """How the start is made.

    Attributes:
        accuracy: Expected accuracy at which it stops.
        wrong: Share of answers that are wrong.
        batch: Sums of a step.
        learning_rate: Of AdamW.
        steps: Most steps.
        every: Steps from one look at the accuracy to the next.
    """

    accuracy: float = 0.33
    wrong: float = 0.4
    batch: int = 256
    learning_rate: float = 3e-3
    steps: int = 3000
    every: int = 5


def wrong_answer(pair: Sum, draw: random.Random) -> str:
    """A sum that is off by a little, or by some tens; never below 0.

    Args:
        pair: The numbers.
        draw: Chooses.
    """
    total, off = sum(pair), draw.choice([1, 2, 3, 10, 20, 30])
    return str(total + off if off > total or draw.random() < 0.5 else total - off)


def make_start(folder: Path, train: list[Sum], held_out: list[Sum], seed: int, start: Start | None = None) -> int:
    """Train a fresh model until it is right as often as wanted, and save it.

    Args:
        folder: Where to.
        train: Sums to train on.
        held_out: Sums that the accuracy is measured on.
        seed: Of the weights and the batches.
        start: How.

    Returns:
        Steps taken.

    Raises:
        RuntimeError: If the accuracy was not reached.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    start = start or Start()
    draw = random.Random(f"start {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig(**MODEL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=start.learning_rate, weight_decay=0.0)
    for step in range(1, start.steps + 1):
        pairs = [draw.choice(train) for _ in range(start.batch)]
        ids, marks = rows(
            [(prompt(p), wrong_answer(p, draw) if draw.random() < start.wrong else answer(p)) for p in pairs]
        )
        logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits[marks[:, 1:]], ids[:, 1:][marks[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % start.every == 0 and examine(model, held_out).sampled >= start.accuracy:
            model.save_pretrained(folder)
            save_tokenizer(folder)
            return step
    raise RuntimeError(f"expected an accuracy of {start.accuracy} within {start.steps} steps, but it was not reached")

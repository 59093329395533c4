"""Accuracy without sampling: the probability of each right answer, from one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning.sums import EOS, IDS, PAD, Sum, answer, encode, prompt


@dataclass(frozen=True)
class Score:
    """How well a model adds.

    Attributes:
        sampled: Mean probability of the right answer and its end, which is the expected accuracy at temperature 1.
        greedy: Share of sums whose greedy answer is right.
        entropy: Mean entropy in nats of the next token, over the tokens of right answers.
    """

    sampled: float
    greedy: float
    entropy: float


def rows(texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Prompts and answers as padded token ids, and which of them are the answer's.

    Args:
        texts: Prompt and answer each.

    Returns:
        Ids, int64, and marks, bool, both ``[B, T]``.
    """
    encoded = [(encode(question), [*encode(reply), IDS[EOS]]) for question, reply in texts]
    width = max(len(question) + len(reply) for question, reply in encoded)
    ids = torch.full((len(encoded), width), IDS[PAD])
    marks = torch.zeros(len(encoded), width, dtype=torch.bool)
    for row, (question, reply) in enumerate(encoded):
        end = len(question) + len(reply)
        ids[row, :end] = torch.tensor([*question, *reply])
        marks[row, len(question) : end] = True
    return ids, marks


def score(logits_BTV: Tensor, ids_BT: Tensor, marks_BT: Tensor) -> Score:
    """How probable the marked tokens are.

    Args:
        logits_BTV: Logits of the token after each position.
        ids_BT: Tokens.
        marks_BT: Which of them are answers; never the first.
    """
    logp_BTV = logits_BTV[:, :-1].double().log_softmax(-1)
    targets_BT, marks_BT = ids_BT[:, 1:], marks_BT[:, 1:]
    logp_BT = logp_BTV.gather(-1, targets_BT[..., None]).squeeze(-1)
    likeliest_BT = logp_BTV.argmax(-1) == targets_BT
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    return Score(
        sampled=float(logp_BT.masked_fill(~marks_BT, 0).sum(1).exp().mean()),
        greedy=float((likeliest_BT | ~marks_BT).all(1).double().mean()),
        entropy=float(entropy_BT[marks_BT].mean()),
    )


def examine(model: Any, sums: Sequence[Sum]) -> Score:
    """How well a model adds.

    Args:
        model: A causal language model.
        sums: The sums that it is asked.
    """
    ids, marks = rows([(prompt(pair), answer(pair)) for pair in sums])
    with torch.inference_mode():
        # Padding stands on the right, where no token of an answer sees it.
        return score(model(input_ids=ids).logits, ids, marks)

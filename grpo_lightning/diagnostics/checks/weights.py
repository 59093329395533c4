"""The loss is the average that it says it is."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grpo_lightning.diagnostics.checks.counts import explain_factor
from grpo_lightning.diagnostics.verdict import Status, Verdict

NAME = "loss weights"

TOLERANCE = 1e-4
"""Relative error of a weight. They are float32 and are summed in float64, so that rounding stays below 1e-6."""


def expected_weights(episode: Tensor, aggregation: str, longest: int | None = None) -> Tensor:
    """Weight of every token in the mean over the tokens of an update.

        "sequence": w_t = 1 / (episodes * tokens of its episode)
        "token": w_t = 1 / tokens
        "constant": w_t = 1 / (episodes * longest)
        "sequence_sum": w_t = 1 / episodes

    Args:
        episode: A name of each token's episode, int64 ``[N]``.
        aggregation: One of these four.
        longest: The fixed length of ``"constant"``.
    """
    if aggregation == "token":
        return torch.full(episode.shape, 1 / max(1, len(episode)), dtype=torch.float64)
    _, member, counts = torch.unique(episode, return_inverse=True, return_counts=True)
    length = {"sequence": counts[member].double(), "constant": float(longest or 1), "sequence_sum": 1.0}[aggregation]
    weights: Tensor = torch.ones(episode.shape, dtype=torch.float64) / (len(counts) * length)
    return weights


def check_weights(
    weight: Tensor,
    episode: Tensor,
    aggregation: str,
    *,
    longest: int | None = None,
    counts: Mapping[str, float],
) -> Verdict:
    """The weights of an update, over all micro-batches and processes, are those of the declared mean.

    Args:
        weight: Loss weight of each token, float64 ``[N]``, without those of weight 0.
        episode: A name of each token's episode, int64 ``[N]``.
        aggregation: As in `expected_weights`.
        longest: As there.
        counts: Counts that a wrong average may have divided by, by what is counted.
    """
    expected = expected_weights(episode, aggregation, longest)
    error = float((weight / expected - 1).abs().max())
    if error <= TOLERANCE:
        return Verdict(NAME, Status.PASS)
    factor = float((weight / expected).median())
    message = "The weights of the tokens in the loss are not those of the declared mean"
    if float((weight / expected - factor).abs().max()) <= TOLERANCE * abs(factor):
        reason = explain_factor(factor, counts) or f"all are {factor:.4g} times too large"
        message += f": {reason}."
    else:
        others = [name for name in ("sequence", "token", "sequence_sum") if name != aggregation]
        same = [
            name for name in others if float((weight / expected_weights(episode, name) - 1).abs().max()) <= TOLERANCE
        ]
        message += f", but those of aggregation={same[0]!r}." if same else ", and differ from it by token."
    return Verdict(
        NAME,
        Status.FAIL,
        message,
        "Count over the whole optimizer step: all its micro-batches and processes, all sequences of an episode "
        "together. Look at GRPOModule.token_weights and at whatever changes loss_weight behind it. If the mean is "
        "another on purpose, set reactions={'loss weights': 'log'}.",
        {
            "sum of the weights": float(weight.sum()),
            "expected sum": float(expected.sum()),
            "largest relative error": error,
            "allowed": TOLERANCE,
            "episodes": len(set(episode.tolist())),
            "tokens": len(weight),
            "aggregation": aggregation,
        },
        cause="wrong_count",
        ruled_out=("episodes of several sequences (counted by episode)", "fillers (they have weight 0)"),
    )


def check_some_weight(tokens: int, trainable_groups: int | None) -> Verdict | None:
    """An update trains on something; None where it does.

    Args:
        tokens: Tokens with a weight.
        trainable_groups: Groups of the update with two or more episodes to train on; None if unknown.
    """
    if tokens:
        return None
    if not trainable_groups:
        return Verdict(NAME, Status.NO_POWER, "The update has only fillers: its groups had nothing to compare.")
    return Verdict(
        NAME,
        Status.FAIL,
        "No token of this update has a weight in the loss, although its groups can be trained on.",
        "Look at what changes loss_weight or masks tokens after packing.",
        {"tokens with a weight": 0, "groups that can be trained on": trainable_groups},
        cause="all_masked",
        ruled_out=(f"groups that were dropped ({trainable_groups} were not)",),
    )

"""The results of both sides, next to each other."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.trl_losses.batch import Batch
from benchmarks.trl_losses.cases import TOLERANCE, Case
from benchmarks.trl_losses.ours import computed


def compared(case: Case, batch: Batch, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison as it is written down.

    Args:
        case: What is compared.
        batch: The tensors.
        theirs: What TRL computed.
    """
    ours = computed(case, batch, theirs["answers"])
    if case.compares == "advantages":
        result = {name: theirs[name] for name in ("advantages", "answers")}
        apart = {"advantages": relative(ours.advantages, _tensor(theirs["advantages"]))}
    else:
        names = ("loss", "gradient", "entropy_gradient", "answers")
        result = {name: theirs[name] for name in names}
        apart = {"loss": relative(_tensor([ours.loss]), _tensor([theirs["loss"]])), "gradient": gradients(ours, theirs)}
    return {
        "name": case.name,
        "trainer": case.trainer,
        "trl": dict(case.trl),
        "here": {name: getattr(value, "__name__", value) for name, value in case.here.items()},
        "here_loss": ours.loss,
        "relative_difference": apart,
        "equal": max(apart.values()) <= TOLERANCE,
        "difference": case.difference,
        "follows": case.follows,
        "note": case.note,
        "computed_by_trl": result,
    }


def gradients(ours: Any, theirs: Mapping[str, Any]) -> float:
    """Relative difference of the gradients by log-probabilities and entropies."""
    entropy = theirs["entropy_gradient"] or [0.0] * len(theirs["gradient"])
    both = torch.cat([ours.gradient, ours.entropy_gradient])
    return relative(both, _tensor(theirs["gradient"] + entropy))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Length of the difference in units of the length of TRL's."""
    return float((ours - theirs).norm() / theirs.norm())


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)

"""What the trainer itself says of a rollout's tokens before it trains on them.

Shapes: ``R`` ledger rows of a rollout, ``N`` sampled tokens of a micro-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from grpo_lightning.distributed import processes
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.micro_batches import Layout


@dataclass(frozen=True)
class Rescored:
    """One forward pass over a rollout, by ledger row; NaN where nothing is trained on.

    Attributes:
        logprobs: Of the policy that the epoch begins with (the proximal policy), float64 ``[R]``.
        entropy: Of that policy, nats, float64 ``[R]``.
        reference: Log-probabilities under the reference, float64 ``[R]``; NaN if they were not asked for.
        update: Optimizer step of the first pass that trains on it, int64 ``[R]``; -1 for none.
    """

    logprobs: Tensor
    entropy: Tensor
    reference: Tensor
    update: Tensor

    def state(self) -> dict[str, list[float]]:
        """Plain values, for a checkpoint."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Sequence[float]]) -> Self:
        """From the values of `state`."""
        kinds = {"update": torch.int64}
        return cls(**{k: torch.tensor(v, dtype=kinds.get(k, torch.float64)) for k, v in state.items()})

    def proximal(self, ledger_index: Tensor) -> Tensor:
        """Log-probabilities of sampled tokens as the trainer computed them, float64 ``[N]``; NaN if unknown.

        Args:
            ledger_index: `PackedBatch.ledger_index` of each, int64 ``[N]``.
        """
        return at_rows(self.logprobs, ledger_index)


def at_rows(values: Tensor, ledger_index: Tensor) -> Tensor:
    """Values of ledger rows, NaN for rows that there are not.

    Args:
        values: Float ``[R]``.
        ledger_index: Rows, int64 ``[N]``.
    """
    found = torch.full(ledger_index.shape, torch.nan, dtype=values.dtype)
    known = (ledger_index >= 0) & (ledger_index < len(values))
    found[known] = values[ledger_index[known]]
    return found


Compute = Callable[[PackedBatch], Mapping[str, Tensor]]
"""From a micro-batch to ``logprobs``, ``entropy`` and perhaps ``reference`` of its targets, ``[N]`` each."""


def rescore(batches: Sequence[PackedBatch], layout: Layout, compute: Compute) -> Rescored:
    """Compute the first pass over a rollout without training on it, in all processes together.

    All processes must call it.

    Args:
        batches: This process's micro-batches, in training order.
        layout: How the rollout was cut.
        compute: Computes one of them.
    """
    parts: list[dict[str, Tensor]] = []
    for batch in batches[: layout.updates * layout.micro_batches]:
        real = (batch.loss_weight != 0).cpu()
        row = batch.ledger_index.cpu()[real]
        step = batch.index // (layout.micro_batches * layout.processes)
        values = {name: column.detach().cpu().double()[real] for name, column in compute(batch).items()}
        parts.append({"row": row, "update": torch.full_like(row, step), **values})
    everything = [part for mine in processes().gather(parts) for part in mine]
    rows = 1 + max((int(part["row"].max()) for part in everything if len(part["row"])), default=-1)
    columns = {name: torch.full((rows,), torch.nan, dtype=torch.float64) for name in ("logprobs", "entropy")}
    columns["reference"] = columns["logprobs"].clone()
    columns["update"] = torch.full((rows,), -1, dtype=torch.int64)
    for part in everything:
        for name, column in columns.items():
            if name in part:
                column[part["row"]] = part[name]
    return Rescored(**columns)

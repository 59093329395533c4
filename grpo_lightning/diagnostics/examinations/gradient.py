"""The gradient is that of the declared loss, and reaches what is trained."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from grpo_lightning.diagnostics.checks.declared_loss import declared_loss
from grpo_lightning.diagnostics.checks.gradient import (
    LOCAL_MICRO_BATCHES,
    MICRO_BATCHES,
    PROCESSES,
    check_cleared,
    check_closed_form,
    check_reached,
)
from grpo_lightning.diagnostics.checks.weights import check_some_weight, check_weights
from grpo_lightning.diagnostics.examination import Examination, Run
from grpo_lightning.diagnostics.update import Update, gradient_norm
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.distributed import processes
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.packing import is_trainable, locate
from grpo_lightning.rollout.rollout import Rollout

KEPT_FACTS = 4096
"""Points of a series that the report gets at most."""


class GradientExamination(Examination):
    """Holds the gradient at the logprobs against its closed form, and sees whether it gets to the parameters."""

    name = "gradient"

    def __init__(self) -> None:
        self._watched: dict[int, RemovableHandle] = {}
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()
        self._errors: deque[dict[str, float]] = deque(maxlen=KEPT_FACTS)
        self._episodes: _Episodes | None = None
        self._position = -1
        self._begin_update()

    def _begin_update(self) -> None:
        self._first = True
        self._arrived: set[int] = set()
        self._nonzero = False
        self._leftover: list[Tensor] = []

    def facts(self) -> dict[str, Any]:
        """Relative error of the gradient by update."""
        return {"closed_form": list(self._errors)}

    def on_rollout(self, run: Run, rollout: Rollout) -> Sequence[Verdict]:
        """Before anything is computed: is there anything to train on?"""
        # With several processes, one may have fillers alone.
        if rollout.layout.processes > 1 or not rollout.groups:
            return ()
        tokens = sum(int((batch.loss_weight != 0).sum()) for batch in rollout.batches)
        empty = check_some_weight(tokens, _trainable(rollout.groups))
        return () if empty is None else (empty,)

    def on_batch(self, run: Run, batch: PackedBatch) -> None:
        """Watch what the backward pass brings to the parameters."""
        if first_of_update(run):
            self._begin_update()
        else:
            self._first = False
        self._position = batch.index
        for parameter in run.trainable.values():
            if id(parameter) not in self._watched:
                self._watched[id(parameter)] = parameter.register_hook(_Watch(self, parameter))  # type: ignore[no-untyped-call]

    def note(self, parameter: Tensor, gradient: Tensor) -> None:
        """A gradient is about to be added to a parameter's."""
        self._arrived.add(id(parameter))
        if not self._nonzero:
            self._nonzero = bool(gradient.any())
        if self._first and parameter.grad is not None:
            self._leftover.append(parameter.grad.detach().clone())

    def on_update(self, run: Run, update: Update) -> Sequence[Verdict]:
        """Judge the gradient and the weights."""
        evidence, module = update.evidence, run.module
        empty = check_some_weight(len(evidence), self._trainable_groups(run))
        if empty is not None:
            return [empty]
        episodes = self._episode_of(run, update)
        counts = _counts(run, episodes)
        loss = declared_loss(module.objective, processes().count)
        closed = check_closed_form(evidence, loss, counts=counts, max_error=run.thresholds.gradient_error)
        if "relative error" in closed.evidence:
            error = float(closed.evidence["relative error"])
            self._errors.append({"update": run.trainer.global_step, "error": error})
        gradient = evidence.gradient.nan_to_num()
        verdicts = [
            check_weights(
                evidence.loss_weight,
                episodes,
                module.hparams["aggregation"],
                longest=module.aggregation_length,
                counts=counts,
            ),
            closed,
            check_cleared(gradient_norm(self._leftover)),
        ]
        if closed.status is not Status.NO_POWER:
            verdicts.append(
                check_reached(
                    at_logprobs=float(gradient.norm()),
                    at_parameters=update.grad_norm,
                    trainable=len(run.trainable),
                    arrived=len(self._arrived),
                    arrived_nonzero=self._nonzero,
                )
            )
        return verdicts

    def _episode_of(self, run: Run, update: Update) -> Tensor:
        """A name of each token's episode; its sequence's where the episodes are unknown."""
        rollout = None if run.data is None else run.data.rollout
        if rollout is None or not rollout.groups:
            return update.evidence.sequence
        if self._episodes is None or self._episodes.rollout is not rollout:
            self._episodes = _Episodes(rollout)
        return self._episodes.of(update.evidence.ledger_index)

    def _trainable_groups(self, run: Run) -> int | None:
        """How many groups of this update can be trained on."""
        rollout = None if run.data is None else run.data.rollout
        if rollout is None or not rollout.groups or self._position < 0:
            return None
        layout = rollout.layout
        size = len(rollout.groups) // layout.updates
        step = self._position // (layout.micro_batches * layout.processes) % layout.updates
        groups = rollout.groups[step * size : (step + 1) * size]
        return _trainable(groups)


def _trainable(groups: Sequence[Group]) -> int:
    """How many groups can be trained on."""
    return sum(
        sum(map(is_trainable, group.episodes)) >= 2 and any(is_trainable(e) and not e.masked for e in group.episodes)
        for group in groups
    )


class _Watch:
    """Tells an examination what a backward pass brings to a parameter."""

    def __init__(self, owner: GradientExamination, parameter: Tensor) -> None:
        self._owner, self._parameter = owner, parameter

    def __call__(self, gradient: Tensor) -> None:
        self._owner.note(self._parameter, gradient)


class _Episodes:
    """Which episode each ledger row of a rollout belongs to."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        located = [
            (row, number, index) for number, g in enumerate(locate(rollout.groups)) for index, _, row in g.ledgers()
        ]
        self._starts = np.array([row for row, *_ in located])
        names = {key: name for name, key in enumerate(dict.fromkeys((n, i) for _, n, i in located))}
        self._names = np.array([names[n, i] for _, n, i in located])

    def of(self, ledger_index: Tensor) -> Tensor:
        """A number of each row's episode, int64 ``[N]``."""
        found = np.searchsorted(self._starts, ledger_index.numpy(), side="right") - 1
        return torch.from_numpy(self._names[found])


def first_of_update(run: Run) -> bool:
    """Whether the micro-batch that is about to be computed is the first of its optimizer step."""
    return bool(run.trainer.fit_loop.epoch_loop.batch_idx % run.trainer.accumulate_grad_batches == 0)


def _counts(run: Run, episodes: Tensor) -> dict[str, float]:
    """What a mean may wrongly be taken over."""
    micro_batches, count, tokens = run.trainer.accumulate_grad_batches, processes().count, len(episodes)
    sequences = len(set(episodes.tolist()))
    counts: dict[str, float] = {
        PROCESSES: count,
        LOCAL_MICRO_BATCHES: micro_batches,
        MICRO_BATCHES: micro_batches * count,
        "sequences": sequences,
        "tokens": tokens,
        "tokens per sequence": tokens / max(1, sequences),
    }
    if run.data is not None and run.data.rollout is not None:
        counts["updates per rollout"] = run.data.rollout.layout.updates
        counts["samples per prompt"] = len(run.data.rollout.groups[0].episodes) if run.data.rollout.groups else 1
    return counts

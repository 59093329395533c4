"""Faults in the trainer's forward pass."""

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

import grpo_lightning.policy
import grpo_lightning.rollout.micro_batches
from benchmarks.faults.fault import PRE_FLIGHT, Stage, fault, updates
from benchmarks.faults.zoo.optimizer import begun_adapter
from grpo_lightning.policy import Policy
from grpo_lightning.rollout.batch import PROMPT, PackedBatch


def _computes(stage: Stage, change: Any) -> None:
    """The policy computes on a changed batch."""
    stage.wrap(
        Policy, "token_logprobs", lambda right: lambda self, batch, **options: right(self, change(batch), **options)
    )


@fault("wrong_forward", deadline=PRE_FLIGHT)
def positions_off_by_one(stage: Stage) -> None:
    """Completions begin one position too late in the trainer."""
    _computes(
        stage,
        lambda batch: batch.replace(position_ids=batch.position_ids + (batch.sequence_ids != PROMPT)),
    )


@fault("wrong_forward", deadline=PRE_FLIGHT)
def attention_leaks(stage: Stage) -> None:
    """In the packed row each sample sees the samples before it."""

    def leaking(batch: PackedBatch) -> PackedBatch:
        first = torch.where(batch.sequence_ids == PROMPT, PROMPT, batch.row_ids)
        stage.note(not torch.equal(first, batch.sequence_ids))
        return batch.replace(sequence_ids=first)

    stage.wrap(grpo_lightning.policy, "attention_plan", lambda right: lambda batch: right(leaking(batch)))


@fault("context_changed", deadline=PRE_FLIGHT)
def prompt_differs(stage: Stage) -> None:
    """The trainer's template renders another system prompt than the engine's: one token differs."""

    def changed(batch: PackedBatch) -> PackedBatch:
        ids = batch.input_ids.clone()
        prompt = torch.nonzero(batch.sequence_ids == PROMPT).squeeze(1)
        starts = prompt[torch.cat([prompt.new_ones(1), batch.row_ids[prompt].diff()]) > 0]
        stage.note(bool((ids[starts + 4] != ids[starts + 2]).any()))
        ids[starts + 4] = ids[starts + 2]
        return batch.replace(input_ids=ids)

    stage.wrap(
        grpo_lightning.rollout.micro_batches, "pack", lambda pack: lambda *args, **named: changed(pack(*args, **named))
    )


@fault("wrong_forward", deadline=PRE_FLIGHT)
def ratio_of_wrong_tokens(stage: Stage) -> None:
    """Logits are taken one position too far: the state that has seen the token is asked for it."""

    def change(batch: PackedBatch) -> PackedBatch:
        return batch.replace(target_index=(batch.target_index + 1).clamp(max=batch.num_tokens - 1))

    _computes(stage, change)


class _Held:
    """Weights that the forward pass goes on using from the first training step on.

    Args:
        noise: Standard deviation of what `disturb` adds.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.weights: dict[str, Tensor] = {}
        self._noise = noise

    def wrap(self, right: Any) -> Any:
        """`Policy.token_logprobs` with these weights, taken when a gradient is first asked for."""

        def wrong(policy: Policy, batch: PackedBatch, **options: bool) -> Any:
            if not self.weights and not torch.is_grad_enabled():
                return right(policy, batch, **options)
            if not self.weights:
                self.weights = {n: p.detach().clone() for n, p in policy.trainable_parameters().items()}
            with policy._holding(self.weights):
                return right(policy, batch, **options)

        return wrong

    def disturb(self) -> None:
        """Add noise."""
        for name, weight in self.weights.items():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * self._noise)


def _many_updates(stage: Stage) -> None:
    stage.data |= {"inner_epochs": 16}


@fault("policy_frozen", deadline=updates(4))
def frozen_policy(stage: Stage) -> None:
    """The forward pass uses a cached copy of the adapter: the parameters move, the logprobs never do."""
    _many_updates(stage)
    stage.wrap(Policy, "token_logprobs", _Held().wrap)


@fault("frozen_behind_dropout", deadline=updates(30))
def frozen_behind_dropout(stage: Stage) -> None:
    """The forward pass uses a cached copy of the adapter behind LoRA dropout of 0.1, which makes every ratio vary."""
    _many_updates(stage)
    stage.module["lora_dropout"] = 0.1

    # Dropout does nothing while B is 0.
    stage.module["adapter"] = begun_adapter(stage)
    stage.wrap(Policy, "token_logprobs", _Held().wrap)


class _Disturb(Callback):
    def __init__(self, held: _Held) -> None:
        self._held = held

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self._held.disturb()


@fault("frozen_behind_noise", deadline=updates(30))
def frozen_behind_noise(stage: Stage) -> None:
    """The forward pass uses a copy of the adapter to which noise is added before each update."""
    _many_updates(stage)
    held = _Held(noise=1e-4)
    stage.callbacks.append(_Disturb(held))
    stage.wrap(Policy, "token_logprobs", held.wrap)


@fault("noisy_forward", deadline=updates(8), reaction="warn")
def dropout_drowns_the_update(stage: Stage) -> None:
    """LoRA dropout of 0.5 in a healthy run: its noise is larger than what the updates change."""
    _many_updates(stage)
    stage.module |= {"lora_dropout": 0.5, "learning_rate": 2e-5}


@fault("not_finite", deadline=updates(1))
def logits_overflow(stage: Stage) -> None:
    """Some logprobs are NaN: an overflow in the model's last layer."""

    def make(right: Any) -> Any:
        def wrong(policy: Policy, batch: PackedBatch, **options: bool) -> Any:
            result = right(policy, batch, **options)
            broken = torch.arange(len(result.logprobs)) % 50 == 3
            stage.note(bool(broken.any()))
            return result._replace(logprobs=torch.where(broken, torch.nan, result.logprobs))

        return wrong

    stage.wrap(Policy, "token_logprobs", make)

"""Settings of the Trainer that rollouts need, or that cannot work, by name and before anything expensive."""

from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.attention import FLEX, SHARED_PROMPT
from grpo_lightning.errors import ConfigurationError

_WHY_NOT = {
    "FSDPStrategy": (
        "it shards the output head, which the loss reads directly, and its precision plugin refuses clipping by norm"
    ),
    "ModelParallelStrategy": "it shards the output head, which the loss reads directly",
    "DeepSpeedStrategy": "it owns the optimizer step, which the detectors must see before it is applied",
}


def check_trainer(trainer: Any, stage: str, updates_per_epoch: int) -> None:
    """Refuse what cannot work; set what a bare Trainer lacks.

    Args:
        trainer: The Trainer.
        stage: ``"fit"``, ``"validate"`` or ``"predict"``.
        updates_per_epoch: Optimizer steps of one epoch.

    Raises:
        ConfigurationError: Naming the setting, why it cannot work, and what to use instead.
    """
    _check_strategy(trainer)
    if trainer.precision == "16-mixed":
        raise ConfigurationError(
            "expected another precision than '16-mixed': its gradient scaler skips steps on overflow, which the "
            "policy's version and the detectors would take for updates. Use 'bf16-mixed' or '32-true'"
        )
    if isinstance(trainer.strategy, SingleDeviceStrategy) and trainer.strategy.root_device.type == "mps":
        raise ConfigurationError(
            "expected another device than 'mps', which has no float64 for the detectors' statistics; set "
            "Trainer(accelerator='cpu')"
        )
    if stage == "fit":
        _set_reload(trainer)
        _check_limit(trainer, updates_per_epoch)


def check_attention(trainer: Any, implementation: str) -> None:
    """Refuse to train with an attention that has no gradient on the Trainer's device.

    Args:
        trainer: The Trainer.
        implementation: ``attn_implementation`` of the module.

    Raises:
        ConfigurationError: Naming what to use instead.
    """
    if implementation == FLEX and trainer.strategy.root_device.type == "cpu":
        raise ConfigurationError(
            f"expected another attn_implementation than {FLEX!r} to train on CPU, where PyTorch has no backward pass "
            f"for it; {SHARED_PROMPT!r}, the default, also shares prompts"
        )


def _check_strategy(trainer: Any) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        return
    name = type(strategy).__name__
    raise ConfigurationError(
        f"expected one device or strategy='ddp', but got {name}: {_WHY_NOT.get(name, 'it is not tested')}. "
        "With LoRA, 'ddp' keeps one frozen copy of the base model per device; gradient_checkpointing and bfloat16 "
        "weights make it fit"
    )


def _set_reload(trainer: Any) -> None:
    every = trainer.reload_dataloaders_every_n_epochs
    if every == 0:
        # The default would train on the first rollout for ever.
        trainer.reload_dataloaders_every_n_epochs = 1
        rank_zero_info("Set Trainer(reload_dataloaders_every_n_epochs=1): every epoch is a new rollout.")
    elif every != 1:
        raise ConfigurationError(
            f"expected Trainer(reload_dataloaders_every_n_epochs=1), but got {every}: to train longer on one "
            "rollout set inner_epochs"
        )


def epoch_updates(trainer: Any, updates_per_epoch: int) -> int:
    """Optimizer steps that the Trainer takes of an epoch's, under its limit on batches."""
    micro_batches: int = trainer.accumulate_grad_batches
    return -(-_kept(trainer, updates_per_epoch * micro_batches) // micro_batches)


def another_epoch(trainer: Any, updates: int) -> bool:
    """Whether an epoch is planned after the one that is about to be trained.

    Args:
        trainer: The Trainer.
        updates: Optimizer steps that are left of this epoch, but for the Trainer's limit on batches.
    """
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is not None and 0 <= epochs <= trainer.fit_loop.epoch_progress.current.processed + 1:
        return False
    return bool(steps < 0 or trainer.global_step + epoch_updates(trainer, updates) < steps)


def _kept(trainer: Any, count: int) -> int:
    """Micro-batches that the Trainer takes of an epoch's ``count``, as Lightning counts them."""
    limit = trainer.limit_train_batches
    kept: int = min(count, limit) if isinstance(limit, int) else int(count * limit)
    return kept


def _check_limit(trainer: Any, updates_per_epoch: int) -> None:
    """A cut inside an optimizer step would leave out part of its tokens: only a smoke test may do that."""
    if trainer.fast_dev_run or trainer.limit_train_batches == 0:
        return
    scheduled = [c.scheduling.values() for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    for micro_batches in sorted({m for values in scheduled for m in values} or {trainer.accumulate_grad_batches}):
        count = updates_per_epoch * micro_batches
        kept = _kept(trainer, count)
        if kept % micro_batches or kept == 0:
            name = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
            raise ConfigurationError(
                f"expected {name} to end with a whole optimizer step of {micro_batches} micro-batches, but "
                f"{trainer.limit_train_batches} leaves {kept} of the epoch's {count}; set a multiple of "
                f"accumulate_grad_batches, for example {name}={max(1, kept // micro_batches) * micro_batches}"
            )

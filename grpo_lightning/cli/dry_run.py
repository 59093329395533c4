"""``fit --dry-run``: what a run would do, without loading a model."""

from datetime import datetime
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.loading import holds_start
from grpo_lightning.memory import BatchShape, NoEstimateError, estimate_memory
from grpo_lightning.model_source import require_model
from grpo_lightning.module import GRPOModule

_CONVERTED = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def default_folder() -> Path:
    """A new folder for the resolved settings."""
    return Path("runs") / f"dry-run-{datetime.now():%Y%m%d-%H%M%S}"


def describe(module: GRPOModule, data: RolloutDataModule, trainer: Trainer, folder: Path | None) -> str:
    """Check all that a fit checks before it loads anything, and say what the run would be.

    Args:
        module: The module.
        data: Its data module.
        trainer: The Trainer.
        folder: Where the run will keep its files; None if its logger decides that later.

    Raises:
        ConfigurationError: If the run could not work.
    """
    encoder = data.check(module, trainer)
    prompts = (
        f"environments begin their prompts and play at most {data.episodes.max_turns} turns and "
        f"{data.max_context(module.model_name)} tokens"
        if data.multi_turn
        else f"the first prompt has {len(encoder(data.tasks[0]))} tokens"
    )
    rewards = ["the environment's"] * data.multi_turn + list(data.scorer.names)
    held_out = len(data.val_tasks) if data.val_tasks is not None else 0
    return "\n".join(
        [
            f"Model:    {module.model_name}",
            f"Tasks:    {len(data.tasks)}, {held_out} held out; {prompts}",
            f"Rewards:  {', '.join(rewards)}",
            f"Engine:   {type(data.engine).__name__}",
            f"Batches:  {data.plan(trainer)}",
            f"Memory:   {_memory(module, data, trainer)}",
            f"Run in:   {folder or 'a new folder of its logger'}",
        ]
    )


def _memory(module: GRPOModule, data: RolloutDataModule, trainer: Trainer) -> str:
    """What the largest possible micro-batch needs; nothing is loaded."""
    settings, plan = module.hparams, data.plan(trainer)
    config = require_model(module.model_name)
    own = config.get_text_config().dtype or config.dtype or torch.float32
    rows = -(-plan.prompts // (plan.updates * plan.micro_batches * plan.processes))
    try:
        estimate = estimate_memory(
            config,
            module.adapter_config,
            BatchShape(
                rows, plan.samples, data.max_prompt_tokens, data.max_context(module.model_name) - data.max_prompt_tokens
            ),
            # A "true" precision of Lightning converts the model that was loaded.
            dtype=_CONVERTED.get(trainer.precision) or _dtype(settings["dtype"], own),
            gradient_checkpointing=settings["gradient_checkpointing"],
            hold_reference=holds_start(
                adapter=settings["adapter"],
                full_finetuning=settings["full_finetuning"],
                hold_reference=settings["kl_coef"] > 0,
            ),
            engine_dtype=_dtype(getattr(data.engine, "dtype", "auto"), own),
            attn_implementation=settings["attn_implementation"],
        )
    except NoEstimateError as error:
        return f"no estimate for this architecture ({error})"
    return (
        f"trainer {estimate.trainer / 2**30:.1f} GiB at most (micro-batches of {rows} x {plan.samples} longest "
        f"completions), engine's weights {estimate.engine_weights / 2**30:.1f} GiB"
    )


def _dtype(name: str, own: torch.dtype) -> torch.dtype:
    found: torch.dtype = own if name == "auto" else getattr(torch, name)
    return found

"""In which precision trainer and engine compute."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from grpo_lightning.diagnostics.examination import Run

_FULL = ("32", "32-true", "64", "64-true")


def engine_dtype(run: "Run") -> torch.dtype:
    """Precision of the engine's weights."""
    return _dtype(getattr(None if run.data is None else run.data.engine, "dtype", "auto"), run.module.model_name)


def adapter_dtype(run: "Run") -> torch.dtype | None:
    """Precision in which the engine was told to keep the adapter; None if it knows no such setting."""
    engine: Any = None if run.data is None else run.data.engine
    told = getattr(engine, "lora_dtype", None)
    return None if told is None else engine_dtype(run) if told == "auto" else _dtype(told, run.module.model_name)


def both_exact(run: "Run") -> bool:
    """Whether trainer and engine both compute in float32 or finer, the engine with the adapter too."""
    weight = run.module.policy.causal_lm.get_input_embeddings().weight
    exact = (torch.float32, torch.float64)
    trained = {p.dtype for p in run.trainable.values()}
    trainer = str(run.trainer.precision) in _FULL and {weight.dtype, *trained} <= {*exact}
    return trainer and engine_dtype(run) in exact and adapter_dtype(run) in (None, *exact)


@cache
def _dtype(name: str, model: str) -> torch.dtype:
    """A dtype by its name; ``"auto"`` is the model's, and a name that torch does not know is a coarse one."""
    if name != "auto":
        return getattr(torch, name, torch.bfloat16)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).dtype or torch.float32

"""Which engine samples: vLLM, but where it should only be shown that a section runs without it."""

import os
from typing import Any

from grpo_lightning import TransformersEngine, VLLMEngine
from grpo_lightning.rollout.engine import RolloutEngine

KIND_ENV = "PERFORMANCE_ENGINE"
"""``transformers`` tries the benchmark without vLLM."""


def engine_kind() -> str:
    """``"vllm"`` or ``"transformers"``."""
    kind = os.environ.get(KIND_ENV, "vllm")
    if kind not in ("vllm", "transformers"):
        raise ValueError(f"expected {KIND_ENV} to be vllm or transformers, but got {kind!r}")
    return kind


def make_engine(dtype: Any) -> RolloutEngine:
    """An engine as users get it.

    Args:
        dtype: Its dtype.
    """
    return VLLMEngine(dtype=dtype) if engine_kind() == "vllm" else TransformersEngine(dtype=dtype)

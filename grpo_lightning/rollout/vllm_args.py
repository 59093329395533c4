"""Which of vLLM's own arguments a user may give to `VLLMEngine`."""

import difflib
from collections.abc import Collection, Iterable

from grpo_lightning.errors import ConfigurationError

_OTHER = "it makes vLLM draw from another distribution than the one that the trainer differentiates"
_DISTRIBUTION = f"{_OTHER}, and no correction for that is available"
_ADAPTER = "VLLMEngine sets it from the module's adapter"
_TOKENIZER = "prompts and completions are token ids of the module's model, and vLLM must read them in the same way"

REFUSED_ENGINE_ARGS = {
    **dict.fromkeys(
        ("top_p", "top_k"), f"{_OTHER}, of which nothing would know; RolloutDataModule has a setting of that name"
    ),
    **dict.fromkeys(
        (
            "min_p",
            "temperature",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "generation_config",
            "override_generation_config",
            "logits_processors",
            "watermark",
            "watermark_config",
        ),
        _DISTRIBUTION,
    ),
    "enable_sleep_mode": "VLLMEngine(sleep=True) sets it, and puts the engine to sleep",
    "logprobs_mode": "the trainer needs the logprobs after temperature (processed_logprobs)",
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank"), _ADAPTER),
    **dict.fromkeys(
        ("dtype", "lora_dtype", "gpu_memory_utilization", "tensor_parallel_size", "enforce_eager"),
        "VLLMEngine has an argument of that name",
    ),
    "seed": "VLLMEngine sets it from the data module's seed",
    "max_model_len": "VLLMEngine sets it to max_prompt_tokens + max_tokens",
    **dict.fromkeys(("model", "revision", "code_revision"), "the engine serves the module's model"),
    **dict.fromkeys(("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"), _TOKENIZER),
}
"""Names that would break the run or contradict another setting without any sign of it, each with the reason."""


def refuse_breaking_args(names: Iterable[str]) -> None:
    """Refuse engine arguments that would break the run.

    Raises:
        ConfigurationError: Naming the argument and the reason.
    """
    for name in names:
        if name in REFUSED_ENGINE_ARGS:
            raise ConfigurationError(f"engine_args cannot hold {name!r}: {REFUSED_ENGINE_ARGS[name]}; leave it out")


def refuse_unknown_args(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse engine arguments that vLLM does not have.

    Args:
        names: What the user gave.
        known: What vLLM has.

    Raises:
        ConfigurationError: Naming the argument and the most similar ones that vLLM has.
    """
    allowed = sorted(name for name in known if name not in REFUSED_ENGINE_ARGS and not name.startswith("_"))
    for name in names:
        if name not in allowed:
            similar = difflib.get_close_matches(name, allowed)
            hint = f"did you mean {', '.join(similar)}?" if similar else "see vllm.AsyncEngineArgs for what there is"
            raise ConfigurationError(f"vLLM has no engine argument {name!r} (engine_args); {hint}")

"""Where a policy starts: a base model with a fresh adapter, with an existing one, or with all its weights trained."""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grpo_lightning.adapter_config import (
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    DEFAULT_TARGETS,
    AdapterConfig,
    continued_config,
    fresh_config,
)
from grpo_lightning.adapters import adapter_digest, read_adapter_config, read_adapter_weights
from grpo_lightning.attention import SHARED_PROMPT, register
from grpo_lightning.compiled import compile_layers
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.model_source import require_model
from grpo_lightning.policy import Policy

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float64"]


def adapter_settings(
    *,
    adapter: str | None = None,
    full_finetuning: bool = False,
    dtype: Dtype = "auto",
    lora_rank: int = DEFAULT_RANK,
    lora_alpha: float = DEFAULT_ALPHA,
    lora_dropout: float = 0.0,
    lora_targets: str | Sequence[str] = DEFAULT_TARGETS,
) -> dict[str, Any] | None:
    """The configuration of the adapter that these settings of `load_policy` ask for; None for full fine-tuning.

    Reads at most an ``adapter_config.json``, so that contradictions are found before anything is loaded.

    Raises:
        ConfigurationError: If the settings contradict each other, or ask for what vLLM cannot serve.
    """
    lora_targets = _names_or_pattern(lora_targets)
    if full_finetuning:
        if adapter is not None:
            raise ConfigurationError(
                "expected adapter or full_finetuning, but got both; to train all weights from an adapter on, merge it "
                "first (grpo_lightning.export) and give the merged folder as model"
            )
        given = (lora_rank, lora_alpha, lora_dropout, lora_targets)
        if given != (DEFAULT_RANK, DEFAULT_ALPHA, 0.0, DEFAULT_TARGETS):
            raise ConfigurationError("expected no lora_* settings with full_finetuning, but got some; leave them out")
        if dtype == "bfloat16":
            raise ConfigurationError(_needs_float32("dtype='bfloat16'"))
        return None
    if adapter is None:
        return fresh_config(rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets)
    return continued_config(
        read_adapter_config(Path(adapter)),
        adapter,
        rank=lora_rank,
        alpha=lora_alpha,
        dropout=lora_dropout,
        targets=lora_targets,
    )


def holds_start(*, adapter: str | None, full_finetuning: bool, hold_reference: bool) -> bool:
    """Whether the policy keeps a copy of what is trained as it was at the start.

    A fresh adapter needs none: without it the model is what it was.

    Args:
        adapter: As in `load_policy`.
        full_finetuning: As in `load_policy`.
        hold_reference: As in `load_policy`.
    """
    return adapter is not None or (full_finetuning and hold_reference)


def load_policy(
    model: str,
    *,
    adapter: str | None = None,
    full_finetuning: bool = False,
    hold_reference: bool = True,
    dtype: Dtype = "auto",
    attn_implementation: str = SHARED_PROMPT,
    lora_rank: int = DEFAULT_RANK,
    lora_alpha: float = DEFAULT_ALPHA,
    lora_dropout: float = 0.0,
    lora_targets: str | Sequence[str] = DEFAULT_TARGETS,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
) -> Policy:
    """Load a base model and make a policy of it.

    With an adapter the base model is frozen, and the adapter is float32 whatever the dtype of the base: in bfloat16
    most updates would round away.

    Args:
        model: Directory or hub name of a Hugging Face causal language model.
        adapter: Folder of an adapter in PEFT's format to continue, instead of a fresh one.
        full_finetuning: Train all weights and no adapter.
        hold_reference: With ``full_finetuning``, keep the copy of all weights that `Policy.reference` needs.
        dtype: Dtype of the base model's weights and computation; ``"auto"`` takes the checkpoint's.
        attn_implementation: The shared-prompt attention, or one of transformers' (``"sdpa"``, ``"eager"``, ...).
        lora_rank: Rank of a fresh adapter.
        lora_alpha: Scale of a fresh adapter times its rank.
        lora_dropout: Dropout on the adapter's input. Not 0, it makes the ratio noisy and hides a stuck policy.
        lora_targets: Layers that get a fresh adapter: a name or a list of names, ``"all-linear"`` (all but the output
            head), or any other string as a regular expression for whole module names.
        gradient_checkpointing: Recompute layers in the backward pass instead of keeping their activations.
        torch_compile: Compile the layers for packed batches (`compiled.compile_layers`).

    Raises:
        ConfigurationError: If there is no such model, the settings contradict each other, the adapter does not fit the
            model, or vLLM could not serve it.
    """
    from transformers import AutoModelForCausalLM

    config = adapter_settings(
        adapter=adapter,
        full_finetuning=full_finetuning,
        dtype=dtype,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        lora_targets=lora_targets,
    )
    require_model(model)
    register()
    base: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
    )
    base.config.use_cache = False
    hold = holds_start(adapter=adapter, full_finetuning=full_finetuning, hold_reference=hold_reference)
    _disable_dropout(base)
    if gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if torch_compile:
        compile_layers(base)
    if config is None:
        narrow = {p.dtype for p in base.parameters()} - {torch.float32, torch.float64}
        if narrow:
            raise ConfigurationError(_needs_float32(f"weights of {', '.join(map(str, narrow))} in {model}"))
        return Policy(base.train(), hold_start=hold)
    if adapter is None:
        return Policy(with_adapter(base, config).train())
    weights = read_adapter_weights(Path(adapter))
    return Policy(
        with_adapter(base, config, weights, adapter).train(),
        hold_start=hold,
        start_digest=adapter_digest(Path(adapter)),
    )


def require_full_finetuning(engine: object, precision: str) -> None:
    """Refuse an engine or a precision with which all weights cannot be trained.

    Args:
        engine: The rollout engine.
        precision: The Trainer's.

    Raises:
        ConfigurationError: Naming what to use instead.
    """
    from grpo_lightning.rollout.engine import FullWeightsEngine

    if not isinstance(engine, FullWeightsEngine):
        raise ConfigurationError(
            f"expected an engine that takes whole models with full_finetuning, but {type(engine).__name__} takes "
            "adapters alone; use TransformersEngine, or train an adapter"
        )
    if precision not in ("32-true", "64-true", "bf16-mixed"):
        raise ConfigurationError(_needs_float32(f"Trainer(precision={precision!r})"))


def with_adapter(
    base: Any, config: AdapterConfig, weights: Mapping[str, Tensor] | None = None, source: str = ""
) -> Any:
    """Put an adapter on a base model.

    Args:
        base: The causal language model; changed in place.
        config: The adapter's configuration.
        weights: Its tensors under PEFT's names; fresh ones if omitted.
        source: Where the tensors come from, for messages.

    Returns:
        The ``PeftModel``, its adapter in float32.

    Raises:
        ConfigurationError: If the adapter does not fit the base model.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from grpo_lightning.lora_linear import fuse

    _check_targets(base, config["target_modules"], source)
    peft_model = get_peft_model(base, LoraConfig.from_peft_type(**config), autocast_adapter_dtype=True)
    if any(hasattr(m, "lora_A") for m in (base.get_output_embeddings(), base.get_input_embeddings())):
        raise ConfigurationError(
            f"expected lora_targets among the inner layers, but got {config['target_modules']!r}, which takes in the "
            "output head or the input embedding: vLLM cannot serve those, and the chunked head does not see them"
        )
    if weights is not None:
        _check_weights(weights, get_peft_model_state_dict(peft_model), source)
        set_peft_model_state_dict(peft_model, dict(weights))
    fuse(peft_model)
    return peft_model


def _needs_float32(got: str) -> str:
    return (
        f"expected float32 weights with full_finetuning, but got {got}: in less precision most updates round away. "
        "Use dtype='float32', with Trainer(precision='bf16-mixed') for speed"
    )


def _names_or_pattern(targets: str | Sequence[str]) -> str | Sequence[str]:
    """Targets as PEFT takes them: to PEFT even a plain name is a pattern for the whole path, and so matches nothing."""
    if not isinstance(targets, str) or targets == DEFAULT_TARGETS:
        return targets
    if targets.isidentifier():
        return [targets]
    try:
        re.compile(targets)
    except re.error as error:
        raise ConfigurationError(
            "expected lora_targets to be names of layers, 'all-linear' or a regular expression for whole module names, "
            f"but got {targets!r}: {error}; '.*' stands for any text, as in '.*q_proj'"
        ) from error
    return targets


def _check_targets(base: Any, targets: str | Sequence[str], source: str) -> None:
    """Refuse targets that match no layer: PEFT ignores a wrong name beside right ones."""
    from transformers.pytorch_utils import Conv1D

    if targets == DEFAULT_TARGETS:
        return
    modules = [name for name, _ in base.named_modules()]
    names = [targets] if isinstance(targets, str) else list(targets)

    def matches(name: str) -> bool:
        if isinstance(targets, str):
            return any(re.fullmatch(name, module) for module in modules)
        return any(f".{module}".endswith(f".{name}") for module in modules)

    missing = [name for name in names if not matches(name)]
    if not missing or (source and len(missing) < len(names)):
        # An adapter may list names of several model families; its weights are compared one by one.
        return
    layers = sorted(
        {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not base.get_output_embeddings()
        }
    )
    near = difflib.get_close_matches(missing[0], layers, n=1)
    raise ConfigurationError(
        (f"the adapter in {source} was made for another model: " if source else "")
        + f"expected lora_targets among the model's layers ({', '.join(layers)}), but nothing matches "
        + ", ".join(map(repr, missing))
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Refuse an adapter that does not fit tensor by tensor: PEFT only warns of some of this."""
    problems = [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} has no place in the model" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & found.keys())
            if found[name].shape != expected[name].shape
        ),
    ]
    if problems:
        raise ConfigurationError(
            f"the adapter in {source} was made for another model: {len(problems)} of its tensors do not fit: "
            f"{'; '.join(problems[:3])}. Give the model that it was trained on"
        )


def _disable_dropout(base: nn.Module) -> None:
    """Turn the base model's own dropout off: in training mode it would make every ratio noisy."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

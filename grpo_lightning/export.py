"""What a run trained, as a folder that other tools load: a PEFT adapter, or a whole model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.adapter_config import DEFAULT_ALPHA, DEFAULT_RANK, DEFAULT_TARGETS, AdapterConfig, continued_config
from grpo_lightning.adapters import CONFIG_FILE, read_adapter_config, read_adapter_weights, write_adapter
from grpo_lightning.checkpoint_check import STATE_KEY
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loading import with_adapter
from grpo_lightning.rollout.prompts import PromptRecord
from grpo_lightning.runs import newest_checkpoint
from grpo_lightning.staging import staged
from grpo_lightning.weights import load_exactly

DTYPES = ("float32", "bfloat16", "float16")
"""What a merged model can be saved in."""

_POLICY_PREFIX = "policy.model."


@dataclass(frozen=True)
class TrainedWeights:
    """The trained weights and what they belong to.

    Attributes:
        source: Where they were read.
        model: Directory or hub name of the base model.
        config: Configuration of the adapter; None if all weights were trained.
        state: The adapter's tensors under PEFT's names, or all of the model's under its own.
        prompts: How the run made its prompts; None if the source does not say.
    """

    source: Path
    model: str
    config: AdapterConfig | None
    state: Mapping[str, Tensor]
    prompts: PromptRecord | None = None


def export(source: Path, target: Path, *, merged: bool, dtype: str | None = None) -> list[str]:
    """Write what was trained to a folder.

    Args:
        source: A checkpoint of `GRPOModule`, a run's folder (its newest checkpoint), or an adapter's folder.
        target: The new folder. It appears whole or not at all.
        merged: Write the whole model instead of the adapter.
        dtype: Dtype of a merged model, one of `DTYPES`; the base model's by default.

    Returns:
        Sentences on what of the run's prompts the folder cannot hold, so that its user has to give it.

    Raises:
        ConfigurationError: If there is nothing to export, or the target is not empty.
    """
    if not merged and dtype is not None:
        raise ConfigurationError(f"expected no dtype for an adapter, which is always float32, but got {dtype!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigurationError(f"expected a dtype among {', '.join(DTYPES)}, but got {dtype!r}")
    return export_merged(source, target, dtype=dtype) if merged else export_adapter(source, target)


def export_adapter(source: Path, target: Path) -> list[str]:
    """Write the adapter in PEFT's format, in float32. Neither the base model nor a GPU is needed.

    Args:
        source: As in `export`.
        target: As in `export`.

    Returns:
        As `export`.

    Raises:
        ConfigurationError: Also if all weights were trained, so that there is no adapter.
    """
    _require_free(target)
    trained = read_trained(source)
    if trained.config is None:
        raise ConfigurationError(f"expected an adapter in {source}, but all weights were trained: export it merged")
    write_adapter(trained.state, trained.config, target)
    notes = _not_in_a_template(trained.prompts)
    if trained.prompts is not None and trained.prompts["chat_template"] is not None:
        notes.append(
            "An adapter's folder holds no chat template: give the run's (data.chat_template) with each prompt."
        )
    return notes


def export_merged(source: Path, target: Path, *, dtype: str | None = None) -> list[str]:
    """Write the whole model with tokenizer and generation configuration, as ``save_pretrained`` does.

    The chat template is the one that the run made its prompts with.

    The adapter is merged in float32, whatever the base model's dtype, and rounded once, when it is saved.

    Args:
        source: As in `export`.
        target: As in `export`.
        dtype: As in `export`.

    Returns:
        As `export`.

    Raises:
        ConfigurationError: Also if the weights do not fit the base model, or the dtype.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _require_free(target)
    trained = read_trained(source)
    wanted = AutoConfig.from_pretrained(trained.model).dtype if dtype is None else getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32)
    if trained.config is None:
        load_exactly(model, trained.state)
    else:
        adapted = with_adapter(model, trained.config, trained.state, str(trained.source))
        model = adapted.merge_and_unload(safe_merge=True)
    model.to(wanted or torch.float32)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise ConfigurationError(
            f"expected weights that fit {wanted}, but some overflow; export in bfloat16 or float32"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(trained.model)
    if trained.prompts is not None and trained.prompts["chat_template"] is not None:
        tokenizer.chat_template = trained.prompts["chat_template"]
    with staged(target) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return _not_in_a_template(trained.prompts)


def read_trained(source: Path) -> TrainedWeights:
    """Read the trained weights of a checkpoint, a run's folder, or an adapter's folder.

    Raises:
        ConfigurationError: If it is none of these.
    """
    if (source / CONFIG_FILE).is_file():
        saved = read_adapter_config(source)
        config = continued_config(
            saved, str(source), rank=DEFAULT_RANK, alpha=DEFAULT_ALPHA, dropout=0.0, targets=DEFAULT_TARGETS
        )
        model = saved.get("base_model_name_or_path")
        if not model:
            raise ConfigurationError(f"expected base_model_name_or_path in {source / CONFIG_FILE}, but it names none")
        return TrainedWeights(source, model, config, read_adapter_weights(source))
    if source.is_dir():
        checkpoint = newest_checkpoint(source)
        if checkpoint is None:
            raise ConfigurationError(
                f"expected a checkpoint, a run's folder or an adapter's folder, but there is neither {CONFIG_FILE} nor "
                f"a whole *.ckpt in {source} or its checkpoints folder"
            )
        source = checkpoint
    return _read_checkpoint(source)


def _read_checkpoint(path: Path) -> TrainedWeights:
    if not path.is_file():
        raise ConfigurationError(
            f"expected a checkpoint, a run's folder or an adapter's folder, but {path} is not there"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model, record = checkpoint["hyper_parameters"]["model"], checkpoint[STATE_KEY]["start"]
    except Exception as error:
        # Reading a foreign file can fail in any way.
        raise ConfigurationError(f"expected a checkpoint of GRPOModule, but {path} is none: {error}") from error
    prompts = checkpoint[STATE_KEY].get("prompts")
    state = {name.removeprefix(_POLICY_PREFIX): tensor for name, tensor in checkpoint["state_dict"].items()}
    if record["adapter_config"] is None:
        return TrainedWeights(path, model, None, state, prompts)
    # In a live model PEFT puts the adapter's name, "default", into each parameter's.
    state = {name.removesuffix(".default.weight") + ".weight": tensor for name, tensor in state.items()}
    return TrainedWeights(path, model, json.loads(record["adapter_config"]), state, prompts)


def _not_in_a_template(prompts: PromptRecord | None) -> list[str]:
    """What of the run's prompts no chat template holds."""
    if prompts is None:
        return []
    notes = []
    if prompts["plain_prompts"]:
        notes.append("The run's prompts were plain text: use no chat template.")
    if prompts["system_prompt"] is not None:
        notes.append(f"Give the run's system prompt with each prompt: {prompts['system_prompt']!r}.")
    if prompts["chat_template_args"]:
        notes.append(
            f"Give the run's arguments of the chat template with each prompt: {prompts['chat_template_args']}."
        )
    return notes


def _require_free(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigurationError(f"expected a new or empty folder, but {target} exists; remove it or choose another")

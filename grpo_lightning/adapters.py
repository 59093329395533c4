"""Adapters on disk, in PEFT's format."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_lightning.adapter_config import AdapterConfig
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.staging import staged

if TYPE_CHECKING:
    from grpo_lightning.policy import Policy

CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def save_adapter(policy: "Policy", directory: Path) -> None:
    """Write the policy's adapter as float32 safetensors with its configuration.

    transformers, PEFT and vLLM load it as it is.

    Args:
        policy: The policy.
        directory: Where to; must not exist yet.
    """
    from peft import get_peft_model_state_dict

    write_adapter(get_peft_model_state_dict(policy.model), policy.adapter_config(), directory)


def write_adapter(weights: Mapping[str, Tensor], config: AdapterConfig, directory: Path) -> None:
    """Write an adapter's folder; it appears whole or not at all.

    Args:
        weights: The adapter's tensors under PEFT's names.
        config: Its configuration.
        directory: Where to; must not exist yet.
    """
    from safetensors.torch import save_file

    state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}
    with staged(directory) as staging:
        save_file(state, staging / _WEIGHTS_FILES[0], metadata={"format": "pt"})
        text = json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True)
        (staging / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read an adapter's configuration.

    Raises:
        ConfigurationError: If the folder does not hold an adapter in PEFT's format.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"expected a folder with a PEFT adapter, but there is no {CONFIG_FILE} in {directory}; give a local folder "
            "as PEFT's save_pretrained or AdapterExport write it"
        )
    _weights_file(directory)
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"expected JSON in {directory / CONFIG_FILE}, but got: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"expected a JSON object in {directory / CONFIG_FILE}, but got {config!r}")
    return config


def read_adapter_weights(directory: Path) -> dict[str, Tensor]:
    """Read an adapter's tensors under PEFT's names, as float32 whatever they were saved in."""
    path = _weights_file(directory)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.to(torch.float32) for name, tensor in state.items()}


def adapter_digest(directory: Path) -> str:
    """SHA-256 of configuration and weights: what the adapter is, wherever its folder stands."""
    digest = hashlib.sha256()
    for path in (directory / CONFIG_FILE, _weights_file(directory)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weights_file(directory: Path) -> Path:
    for name in _WEIGHTS_FILES:
        if (directory / name).is_file():
            return directory / name
    raise ConfigurationError(f"expected {' or '.join(_WEIGHTS_FILES)} in {directory}, but found neither")

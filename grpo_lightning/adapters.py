"""Adapters on disk, in PEFT's format."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from grpo_lightning.policy import Policy


def save_adapter(policy: Policy, directory: Path) -> None:
    """Write the adapter as float32 safetensors with its configuration; the directory appears whole or not at all.

    transformers, PEFT and vLLM load it as it is.

    Args:
        policy: The policy.
        directory: Where to; must not exist yet.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    staging.mkdir(parents=True)
    try:
        state = {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in get_peft_model_state_dict(policy.model).items()
        }
        save_file(state, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        config: Any = policy.model.peft_config["default"]
        mode, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(staging)
        finally:
            config.inference_mode = mode
        _sync_directory(staging)
        os.rename(staging, directory)
        _sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _sync_directory(directory: Path) -> None:
    for path in (*directory.glob("*.*"), directory):
        if path.is_dir() and path != directory:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

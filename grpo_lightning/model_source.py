"""The model that the settings name: whether it is there, and how much context it has."""

import os
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError

_EXTENDING_ROPE = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling with which the context is longer than ``max_position_embeddings`` says."""


def expanded(name: str) -> str:
    """A directory or hub name with the home for a leading ``~``, which libraries take for a folder of that name."""
    return os.path.expanduser(name)


def require_model(model: str) -> Any:
    """The Hugging Face configuration of a model, read before anything large is loaded.

    Args:
        model: Directory or hub name of a causal language model.

    Raises:
        ConfigurationError: If there is no such model; it says where was looked and what to do.
    """
    from transformers import AutoConfig, __version__

    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigurationError(_no_model_in(path))
    if not path.exists() and _is_surely_path(model):
        raise ConfigurationError(f"expected a model directory, but there is none at {path.absolute()}")
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        if path.exists():
            raise ConfigurationError(
                f"expected a model in {path.absolute()}, but transformers says: {error}"
            ) from error
        raise ConfigurationError(_not_found(model, path, error)) from error
    except ValueError as error:
        raise ConfigurationError(f"transformers {__version__} cannot load {model}: {error}") from error


def model_context(config: Any) -> int | None:
    """Longest sequence that a model takes, in tokens; None if its configuration does not tell.

    Args:
        config: The Hugging Face configuration of the model.
    """
    text = config.get_text_config()
    context: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    return None if rope.get("rope_type") in _EXTENDING_ROPE else context or None


def require_context(config: Any, max_prompt_tokens: int, max_tokens: int) -> None:
    """Refuse sequences that are longer than the model's context.

    Args:
        config: The Hugging Face configuration of the model.
        max_prompt_tokens: Longest prompt.
        max_tokens: Longest completion.

    Raises:
        ConfigurationError: With the numbers, and the largest ``max_tokens`` that fits.
    """
    context = model_context(config)
    if context is None or max_prompt_tokens + max_tokens <= context:
        return
    fits = context - max_prompt_tokens
    fix = f"set max_tokens to at most {fits}, or lower" if fits > 0 else "lower"
    raise ConfigurationError(
        f"expected max_prompt_tokens + max_tokens <= {context}, the model's context (max_position_embeddings), but got "
        f"{max_prompt_tokens} + {max_tokens} = {max_prompt_tokens + max_tokens}; {fix} max_prompt_tokens"
    )


def _is_surely_path(model: str) -> bool:
    """Whether the name cannot be meant for the hub, where names are ``name`` or ``owner/name``."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def _no_model_in(path: Path) -> str:
    message = f"expected a model with a config.json in {path.absolute()}, but that directory has none"
    if (path / "adapter_config.json").is_file():
        return f"{message}: it holds an adapter; give the base model that it was trained on"
    return f"{message} (it holds {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'})"


def _not_found(model: str, path: Path, error: OSError) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

    message = f"found no model {model!r}: there is no directory {path.absolute()}, and it is not in {HF_HUB_CACHE}"
    if is_offline_mode():
        name = next((v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(v)), "HF_HUB_OFFLINE")
        return (
            f"{message}. The hub was not asked, because {name} is set: unset it, or bring the model into the cache "
            "(hf download), or give the directory of a model"
        )
    return f"{message}, and the hub did not give it: {error}"

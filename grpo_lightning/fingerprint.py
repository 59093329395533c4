"""Telling base models apart without keeping them."""

import hashlib
from typing import Any

import torch
from torch import Tensor

_SAMPLES = 64


def base_fingerprint(causal_lm: Any) -> str:
    """A hash of a base model's architecture and of a few elements of each of its weights.

    The same in every precision of bfloat16 or above that the model is loaded in, with and without an adapter around
    it. Models of one architecture differ in it: a base model, its instruct variant, the same with an adapter merged.

    Args:
        causal_lm: The Hugging Face model.
    """
    weights = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in causal_lm.named_parameters()
        if ".lora_" not in name and parameter.is_floating_point()
    }
    digest = hashlib.sha256(str(causal_lm.config.model_type).encode())
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(_sample(weights[name].detach()).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(weight: Tensor) -> Tensor:
    """Elements at even distances, as bfloat16 on the CPU."""
    flat = weight.flatten()
    count = min(_SAMPLES, len(flat))
    # Integers: Lightning may have made bfloat16 the default dtype here.
    indices = torch.tensor([i * (len(flat) - 1) // max(1, count - 1) for i in range(count)], device=flat.device)
    return flat[indices].to("cpu", torch.bfloat16)

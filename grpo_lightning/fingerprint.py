"""Telling base models apart without keeping them."""

import hashlib
from typing import Any

import torch

_ROWS = 64


def base_fingerprint(causal_lm: Any) -> str:
    """A hash of a base model's architecture and of a sample of its weights.

    The same in every precision of bfloat16 or above that the model is loaded in; models of one architecture
    (a base model and its instruct variant) differ.

    Args:
        causal_lm: The Hugging Face model.
    """
    config = causal_lm.config
    embeddings = causal_lm.get_input_embeddings().weight
    rows = torch.linspace(0, embeddings.shape[0] - 1, _ROWS).long()
    sample = embeddings.detach()[rows.to(embeddings.device)].to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256()
    digest.update(f"{config.model_type} {config.num_hidden_layers} {tuple(embeddings.shape)}".encode())
    digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]

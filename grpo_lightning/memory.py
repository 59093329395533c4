"""How much memory a run needs, by arithmetic: no weights are loaded.

Shapes: ``R`` prompts, ``S`` completions, ``P`` prompt tokens, ``C`` completion tokens, ``H`` query heads, ``K``
key-value heads, ``D`` head size.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.adapter_config import AdapterConfig
from grpo_lightning.functional.logprobs import DEFAULT_CHUNK_BYTES
from grpo_lightning.loading import with_adapter

_ATTENTION = "grpo_memory_estimate"
_LIVE_CHUNKS = 4
"""Chunks of float32 logits that exist at once: the last one's log-probabilities and probabilities while the next
one's logits are divided by the temperature."""


@dataclass(frozen=True)
class BatchShape:
    """Size of a packed micro-batch.

    Attributes:
        prompts: Rows.
        samples: Completions of each.
        prompt_tokens: Length of each prompt.
        completion_tokens: Length of each completion.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def sampled_tokens(self) -> int:
        """Tokens whose log-probabilities are computed."""
        return self.prompts * self.samples * self.completion_tokens

    @property
    def tokens(self) -> int:
        """All tokens; each prompt is there once."""
        return self.prompts * self.prompt_tokens + self.sampled_tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that live tensors take, at their peak. The processes' own code and libraries come on top of it.

    Attributes:
        weights: The model in the trainer, without what is trained.
        trained: What is trained, with its gradients and Adam's two moments.
        reference: The frozen copy of what is trained, if one is held.
        activations: What one micro-batch keeps for its backward pass.
        logits: The chunk of logits that exists at one time.
        update: Copies of what is trained and of its gradients, which the detector compares across the update.
        engine_weights: The model in the engine.
        engine_cache: The engine's key-value cache.
    """

    weights: int
    trained: int
    reference: int
    activations: int
    logits: int
    update: int
    engine_weights: int
    engine_cache: int

    @property
    def trainer(self) -> int:
        """Peak of the trainer: activations and logits are gone when the update comes."""
        return self.weights + self.trained + self.reference + max(self.activations + self.logits, self.update)

    @property
    def engine(self) -> int:
        """Total of the engine."""
        return self.engine_weights + self.engine_cache


def estimate_memory(
    config: Any,
    adapter: AdapterConfig | None,
    shape: BatchShape,
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    hold_reference: bool = False,
    engine_dtype: torch.dtype | None = None,
    cache_tokens: int = 0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> MemoryEstimate:
    """Estimate the memory of trainer and engine for models of softmax attention in the packed layout.

    Args:
        config: The Hugging Face configuration of the model.
        adapter: Configuration of the adapter (`loading.adapter_settings`); None if all weights are trained.
        shape: The largest micro-batch.
        dtype: Of the trainer's weights and computation.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        hold_reference: Whether a copy of what is trained is kept (an adapter that is continued; all weights with a KL).
        engine_dtype: Of the engine's weights and cache; the trainer's by default.
        cache_tokens: Tokens that the engine's cache has room for.
        chunk_bytes: Bound for one chunk of float32 logits.
    """
    model, base_bytes = _meta_model(config, adapter, dtype)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    engine_size = (engine_dtype or dtype).itemsize
    chunk = min(shape.sampled_tokens, max(1, chunk_bytes // (config.vocab_size * 4)))
    logits = chunk * config.vocab_size * (4 * _LIVE_CHUNKS + (dtype.itemsize if dtype.itemsize < 4 else 0))
    if adapter is None:
        # The gradient of the output head, added up chunk by chunk.
        logits += config.vocab_size * config.hidden_size * dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return MemoryEstimate(
        weights=base_bytes if adapter is not None else 0,
        trained=4 * trained,
        reference=trained if hold_reference else 0,
        activations=_activations(model, config, shape, dtype, gradient_checkpointing),
        logits=logits,
        update=2 * trained,
        engine_weights=base_bytes // dtype.itemsize * engine_size,
        engine_cache=2 * cache_tokens * config.num_hidden_layers * heads * head_size * engine_size,
    )


def _meta_model(config: Any, adapter: AdapterConfig | None, dtype: torch.dtype) -> tuple[Any, int]:
    """The policy's model without storage, and the bytes of its base."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION, _attention)
    with torch.device("meta"):
        own = copy.deepcopy(config)
        base: Any = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=_ATTENTION)  # type: ignore[no-untyped-call]
        base.train()
        base_bytes = sum(p.nbytes for p in base.parameters())
        return (base if adapter is None else with_adapter(base, adapter)), base_bytes


def _activations(model: Any, config: Any, shape: BatchShape, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes that a forward pass saves, by running it without storage."""
    saved: dict[int, Tensor] = {}
    fixed = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in fixed:
            # Held, so that no other storage gets its address.
            saved[storage] = tensor
        return tensor

    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    backbone: nn.Module = getattr(causal_lm, causal_lm.base_model_prefix)
    ids = torch.zeros(1, shape.tokens, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device="meta")
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = backbone(
            input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False, batch_shape=shape
        ).last_hidden_state
    total = sum(t.untyped_storage().nbytes() for t in saved.values())
    layers: int = config.num_hidden_layers
    if checkpointing:
        # The inputs of all layers, and all of the one layer that is being computed again.
        total = layers * hidden.nbytes + total // layers
    picked: int = shape.sampled_tokens * config.hidden_size * dtype.itemsize
    return total + picked


class _SavedByAttention(torch.autograd.Function):
    """Saves what the shared-prompt attention saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, shape: BatchShape) -> Tensor:
        (heads, _, size), key_heads = query.shape[1:], key.shape[1]
        groups = shape.prompts * shape.samples
        seen = shape.prompt_tokens + shape.completion_tokens
        parts: list[Tensor] = []
        for rows, length, context in (
            (shape.prompts, shape.prompt_tokens, shape.prompt_tokens),
            (groups, shape.completion_tokens, seen),
        ):
            parts += [query.new_empty(rows, heads, length, size) for _ in ("query", "output")]
            parts += [query.new_empty(rows, key_heads, context, size) for _ in ("key", "value")]
            parts.append(query.new_empty(rows, length, heads, dtype=torch.float32))
        parts.append(query.new_empty(groups, 1, shape.completion_tokens, seen))
        ctx.save_for_backward(*parts)
        return query.new_empty(1, query.shape[2], heads, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError("there is nothing to differentiate")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    output: Tensor = _SavedByAttention.apply(query, key, value, kwargs["batch_shape"])  # type: ignore[no-untyped-call]
    return output, None

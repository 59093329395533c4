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
from grpo_lightning.attention import SHARED_PROMPT, attention_dtype
from grpo_lightning.errors import GRPOError
from grpo_lightning.functional.logprobs import BLOCK_BYTES, DEFAULT_CHUNK_BYTES
from grpo_lightning.loading import with_adapter
from grpo_lightning.policy import no_sharing

_ATTENTION = "grpo_memory_estimate"
_LIVE_CHUNKS = 4
"""Chunks of float32 logits that exist at once: the last one's log-probabilities and probabilities while the next
one's logits are divided by the temperature. With a frozen head on a CPU only blocks of a chunk are float32."""


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
        engine_weights: The model in the engine, without its key-value cache.
    """

    weights: int
    trained: int
    reference: int
    activations: int
    logits: int
    update: int
    engine_weights: int

    @property
    def trainer(self) -> int:
        """Peak of the trainer: activations and logits are gone when the update comes."""
        return self.weights + self.trained + self.reference + max(self.activations + self.logits, self.update)


class NoEstimateError(GRPOError):
    """The arithmetic does not hold for this architecture; the message says why."""


def estimate_memory(
    config: Any,
    adapter: AdapterConfig | None,
    shape: BatchShape,
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    hold_reference: bool = False,
    engine_dtype: torch.dtype | None = None,
    attn_implementation: str = SHARED_PROMPT,
) -> MemoryEstimate:
    """Estimate the memory of trainer and engine for models of softmax attention in the packed layout.

    Args:
        config: The Hugging Face configuration of the model.
        adapter: Configuration of the adapter (`loading.adapter_settings`); None if all weights are trained.
        shape: The largest micro-batch.
        dtype: Of the trainer's weights and computation.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        hold_reference: Whether a copy of what is trained is kept (`loading.holds_start`).
        engine_dtype: Of the engine's weights; the trainer's by default.
        attn_implementation: As in `loading.load_policy`.

    Raises:
        NoEstimateError: If the batch is not packed for this model, or the model cannot run without storage.
        ConfigurationError: If the adapter does not fit the model.
    """
    try:
        model, base_bytes = _meta_model(config, adapter, dtype)
        # Of nested configurations the model may have taken the part for text.
        config = _causal_lm(model).config
        reason = no_sharing(config, attn_implementation)
        if reason is not None:
            raise NoEstimateError(reason)
        activations = _activations(model, config, shape, dtype, gradient_checkpointing)
    except GRPOError:
        raise
    except Exception as error:
        # Foreign code that was not written to run without storage can fail in any way.
        cause = next(iter(str(error).splitlines()), "")
        raise NoEstimateError(f"{type(config).__name__} without weights: {type(error).__name__}: {cause}") from error
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return MemoryEstimate(
        weights=base_bytes if adapter is not None else 0,
        trained=4 * trained,
        reference=trained if hold_reference else 0,
        activations=activations,
        logits=_logits(config, shape, dtype, full=adapter is None),
        update=2 * trained,
        engine_weights=base_bytes // dtype.itemsize * (engine_dtype or dtype).itemsize,
    )


def _logits(config: Any, shape: BatchShape, dtype: torch.dtype, *, full: bool) -> int:
    chunk = min(shape.sampled_tokens, max(1, DEFAULT_CHUNK_BYTES // (config.vocab_size * 4)))
    if not full and _device() == "cpu":
        return int(chunk * config.vocab_size * dtype.itemsize + _LIVE_CHUNKS * max(BLOCK_BYTES, config.vocab_size * 4))
    logits: int = chunk * config.vocab_size * (4 * _LIVE_CHUNKS + (dtype.itemsize if dtype.itemsize < 4 else 0))
    # With all weights, the gradient of the output head, added up chunk by chunk.
    return logits + (config.vocab_size * config.hidden_size * dtype.itemsize if full else 0)


def _device() -> str:
    """What the trainer is taken to compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


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

    causal_lm = _causal_lm(model)
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
        dtype = attention_dtype(query.dtype, _device())
        for rows, length, context in (
            (shape.prompts, shape.prompt_tokens, shape.prompt_tokens),
            (groups, shape.completion_tokens, seen),
        ):
            parts += [query.new_empty(rows, heads, length, size, dtype=dtype) for _ in ("query", "output")]
            parts += [query.new_empty(rows, key_heads, context, size, dtype=dtype) for _ in ("key", "value")]
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

"""The policy: a causal language model, with a LoRA adapter or whole, and the log-probabilities of a packed batch.

Shapes: ``T`` packed tokens, ``N`` sampled tokens, ``H`` hidden size, ``S`` sequences, ``L`` longest sequence.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from grpo_lightning.adapter_config import AdapterConfig
from grpo_lightning.attention import FLEX, MASKED_IMPLEMENTATIONS, SHARED_PROMPT, attention_plan, dense_mask, flex_mask
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional import TokenLogprobs, log_distributions, token_logprobs
from grpo_lightning.functional.logprobs import DEFAULT_CHUNK_BYTES
from grpo_lightning.rollout.batch import PROMPT, PackedBatch

logger = logging.getLogger(__name__)

_PER_SEQUENCE_IMPLEMENTATIONS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_WHOLE_BYTES = 4 * 2**20
"""Chunk of whole distributions on CPUs: who asks for them goes through them many times, best within the processor's
cache."""

_HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference, in nats, between our head and the model's own that rounding explains."""


class Policy(nn.Module):
    """A causal language model that computes the log-probabilities of packed batches.

    Args:
        model: A ``PeftModel`` around a causal language model, or the bare model if all its weights are trained.
        hold_start: Keep a copy of the trainable weights as they are now: `reference` then means these.
        start_digest: Digest of the adapter that was loaded (`adapters.adapter_digest`), if one was.
    """

    def __init__(self, model: Any, *, hold_start: bool = False, start_digest: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.has_adapter = hasattr(model, "peft_config")
        self.start_digest = start_digest
        self._layout = choose_layout(self.causal_lm.config)
        self._start: dict[str, Tensor] | None = None
        if hold_start:
            self._start = {name: p.detach().clone() for name, p in self.trainable_parameters().items()}

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model, under the adapter if there is one."""
        return self.model.get_base_model() if self.has_adapter else self.model

    def adapter_config(self) -> dict[str, Any]:
        """The adapter's configuration, as in ``adapter_config.json``."""
        config: AdapterConfig = self.model.peft_config["default"].to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert everything, but keep the dtype and values of what is trained.

        Lightning's ``bf16-true`` converts the whole module, after a checkpoint was restored: the adapter's small
        updates would be rounded away.
        """
        kept = {name: p.data for name, p in self.trainable_parameters().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.trainable_parameters().items():
            parameter.data = kept[name].to(parameter.device)
            if self._start is not None:
                self._start[name] = self._start[name].to(parameter.device)
        return self

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the model is the base without any adapter, without gradients."""
        assert self.has_adapter, "a fully trained model has no base beside it"
        # PEFT makes the whole adapter trainable when it comes back, what was frozen too.
        required = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with torch.no_grad(), self.model.disable_adapter():
                yield
        finally:
            for parameter, wanted in required:
                parameter.requires_grad_(wanted)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context the model is the policy as it was before any training, without gradients."""
        if self._start is None:
            # A fresh adapter changes nothing, so this is where it started.
            with self.base():
                yield
        else:
            with torch.no_grad(), self._holding(self._start):
                yield

    @contextlib.contextmanager
    def _holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with other values of the trainable parameters; the parameters themselves stay the same objects."""
        parameters = self.trainable_parameters()
        current = {name: p.data for name, p in parameters.items()}
        # Autocast keeps the cast of a parameter for as long as it lasts, whatever the parameter holds meanwhile.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            for name, parameter in parameters.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = current[name]
            torch.set_autocast_cache_enabled(cached)

    def token_logprobs(self, batch: PackedBatch, *, entropy_gradient: bool = False) -> TokenLogprobs:
        """Log-probability of each sampled token, and its distribution, at the temperature it was sampled with.

        Logits are computed for the sampled tokens alone, in chunks (`functional.token_logprobs`).

        Args:
            batch: The packed micro-batch.
            entropy_gradient: Whether the entropy has a gradient too.
        """
        return token_logprobs(
            self._hidden(batch),
            self._head(),
            batch.target_ids,
            temperature=batch.temperature,
            banned_token_ids=batch.banned_token_ids,
            entropy_gradient=entropy_gradient,
        )

    def log_distributions(self, batch: PackedBatch) -> Iterator[Tensor]:
        """Log-probabilities of the whole vocabulary where each token was sampled, in chunks ``[C, V]`` (slow).

        Args:
            batch: The packed micro-batch.
        """
        hidden = self._hidden(batch)
        return log_distributions(
            hidden,
            self._head(),
            temperature=batch.temperature,
            banned_token_ids=batch.banned_token_ids,
            chunk_bytes=_WHOLE_BYTES if hidden.device.type == "cpu" else DEFAULT_CHUNK_BYTES,
        )

    def _head(self) -> Tensor:
        head = self.causal_lm.get_output_embeddings()
        if head.bias is not None:
            raise ConfigurationError("expected an output head without bias; this model's has one")
        return cast(Tensor, head.weight)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        """Final hidden states that predict the sampled tokens, ``[N, H]``."""
        if self._layout == "sequences":
            ids_SL, lengths_S, sequence_N, position_N = unpack(batch)
            mask = torch.arange(ids_SL.shape[1], device=ids_SL.device) < lengths_S[:, None]
            hidden = self._backbone(input_ids=ids_SL, attention_mask=mask.long())
            picked: Tensor = hidden[sequence_N, position_N]
            return picked
        implementation = self.causal_lm.config._attn_implementation
        if implementation == SHARED_PROMPT:
            # A mask of four dimensions is passed through untouched; this one only keeps transformers from making one.
            extra: dict[str, Any] = {
                "plan": attention_plan(batch),
                "attention_mask": batch.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool),
            }
        elif implementation == FLEX:
            extra = {"attention_mask": flex_mask(batch)}
        else:
            mask = dense_mask(batch)
            dtype = self.causal_lm.get_input_embeddings().weight.dtype
            extra = {
                "attention_mask": mask
                if implementation == "sdpa"
                else torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                    ~mask, torch.finfo(dtype).min
                )
            }
        hidden = self._backbone(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], **extra)
        return cast(Tensor, hidden[0, batch.target_index])

    def _backbone(self, **inputs: Any) -> Any:
        causal_lm = self.causal_lm
        return getattr(causal_lm, causal_lm.base_model_prefix)(**inputs, use_cache=False).last_hidden_state

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare the logits that this class computes with the model's own, on a few tokens.

        Some models scale or cap their logits behind the head; that the ratios would be wrong everywhere is cheap
        to find here and hard to see later.

        Raises:
            ConfigurationError: If they differ by more than rounding.
        """
        model = self.causal_lm
        device = model.get_input_embeddings().weight.device
        ids = torch.arange(8, device=device)[None] % model.config.vocab_size
        # FlexAttention would be compiled for these few tokens, perhaps where there is no compiler.
        is_flex = model.config._attn_implementation == FLEX
        plain = torch.compiler.set_stance("force_eager") if is_flex else contextlib.nullcontext()
        with evaluating(self), plain:
            own = model(input_ids=ids, use_cache=False).logits[0]
            hidden = self._backbone(input_ids=ids)[0]
        own = own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1)
        head = model.get_output_embeddings().weight
        targets = own.argmax(-1)
        ours, *_ = token_logprobs(hidden, head, targets)
        difference = float((ours - own.gather(1, targets[:, None]).squeeze(1)).abs().max())
        if not difference <= _HEAD_TOLERANCE.get(hidden.dtype, 1e-3):
            raise ConfigurationError(
                f"expected logits = head(hidden state), but {type(model).__name__} differs from that by "
                f"{difference:.3g} nats: it scales, caps or shifts its logits, which is not supported"
            )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context a model has no dropout; afterwards each of its parts is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def choose_layout(config: Any) -> Literal["packed", "sequences"]:
    """How the batch is laid out for this model: packed rows, or one padded sequence a row where it must be.

    Args:
        config: The Hugging Face configuration of the model.

    Raises:
        ConfigurationError: If the attention implementation is unknown.
    """
    reason = no_sharing(config, config._attn_implementation)
    if reason is None:
        return "packed"
    logger.warning("Prompts are not shared between the samples of a group (slower, same result): %s.", reason)
    return "sequences"


def no_sharing(config: Any, implementation: str) -> str | None:
    """Why the samples of a group cannot share their prompt with this model; None if they can.

    Args:
        config: The Hugging Face configuration of the model.
        implementation: The attention implementation.

    Raises:
        ConfigurationError: If the attention implementation is unknown.
    """
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if implementation in _PER_SEQUENCE_IMPLEMENTATIONS:
        return f"attention implementation {implementation!r} cannot take the shared-prompt mask"
    if implementation != SHARED_PROMPT and implementation not in MASKED_IMPLEMENTATIONS:
        known = (SHARED_PROMPT, *MASKED_IMPLEMENTATIONS, *_PER_SEQUENCE_IMPLEMENTATIONS)
        raise ConfigurationError(f"unknown attn_implementation {implementation!r}; choose one of {', '.join(known)}")
    if layers != {"full_attention"}:
        return f"the model has layers of types {sorted(layers)}, not full attention alone"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"the model attends within a window of {config.sliding_window} tokens"
    if not hasattr(config, "num_attention_heads"):
        return "the model is not a softmax-attention transformer"
    return None


def unpack(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay a packed batch out as one sequence a row: prompt and own tokens, padded on the right with 0.

    Returns:
        Tokens ``[S, L]``, lengths ``[S]``, and for each sampled token its line and the position of the hidden
        state that predicts it, each ``[N]``.
    """
    place_N = batch.position_ids[batch.target_index]
    if not batch.num_targets:
        return batch.input_ids[None], batch.input_ids.new_tensor([batch.num_tokens]), batch.sequence_index, place_N
    row_S = batch.row_ids.new_zeros(int(batch.sequence_index.max()) + 1)
    row_S[batch.sequence_index] = batch.row_ids[batch.target_index]
    prompt_T = batch.sequence_ids == PROMPT
    own_T = ~prompt_T
    prompt_lengths_R = torch.bincount(batch.row_ids[prompt_T])
    lengths_S = prompt_lengths_R[row_S] + torch.bincount(batch.sequence_ids[own_T], minlength=len(row_S))
    prompts_RP = batch.input_ids.new_zeros(len(prompt_lengths_R), int(prompt_lengths_R.max()))
    prompts_RP[batch.row_ids[prompt_T], batch.position_ids[prompt_T]] = batch.input_ids[prompt_T]
    ids_SL = batch.input_ids.new_zeros(len(row_S), int(lengths_S.max()))
    # What stands behind a shorter prompt is written over next.
    ids_SL[:, : prompts_RP.shape[1]] = prompts_RP[row_S]
    ids_SL[batch.sequence_ids[own_T], batch.position_ids[own_T]] = batch.input_ids[own_T]
    return ids_SL, lengths_S, batch.sequence_index, place_N

"""Attention over the packed, shared-prompt batch, as an attention implementation of transformers.

Shapes: ``T`` packed tokens, ``R`` rows, ``S`` sequences, ``P`` longest prompt, ``C`` longest completion,
``H`` query heads, ``K`` key-value heads, ``D`` head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_lightning.rollout.batch import PROMPT, PackedBatch

SHARED_PROMPT = "grpo_shared_prompt"
"""Name of this implementation in transformers' registry."""

FLEX = "flex_attention"
"""The implementation of transformers that takes the mask of `flex_mask`."""

MASKED_IMPLEMENTATIONS = ("sdpa", "eager", FLEX)
"""Implementations of transformers that share prompts, by a mask."""


@dataclass(frozen=True)
class AttentionPlan:
    """Where the tokens of each prompt and completion stand in the packed batch; built once a batch.

    Prompts and completions are lines of one length each, right-padded; their places, prompts first, are
    ``X = R P + S C``.

    Attributes:
        prompts: Number ``R`` and length ``P`` of the prompts' lines.
        sequences: Number ``S`` and length ``C`` of the completions'.
        token_of_place: Packed index of the token in each place, 0 in padding, int64 ``[X]``.
        place_of_token: Place of each packed token, int64 ``[T]``.
        sequence_row: Row of each completion, int64 ``[S]``.
        mask: What each completion token sees: prompt, then own completion, bool ``[S, 1, C, P + C]``.
    """

    prompts: tuple[int, int]
    sequences: tuple[int, int]
    token_of_place: Tensor
    place_of_token: Tensor
    sequence_row: Tensor
    mask: Tensor


def attention_plan(batch: PackedBatch) -> AttentionPlan:
    """Work out the gathers of one batch."""
    is_prompt = batch.sequence_ids == PROMPT
    prompt_index, prompt_valid = _padded_index(is_prompt.nonzero().squeeze(1), batch.row_ids[is_prompt])
    tokens = (~is_prompt).nonzero().squeeze(1)
    # A completion of one token has no input token: number only those that have.
    _, sequence = torch.unique(batch.sequence_ids[tokens], return_inverse=True)
    sequence_index, sequence_valid = _padded_index(tokens, sequence)
    sequence_row = batch.row_ids[sequence_index[:, 0]] if len(sequence_index) else tokens
    length = sequence_index.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    mask = torch.cat(
        [
            prompt_valid[sequence_row][:, None, :].expand(-1, length, -1),
            causal.expand(len(sequence_index), -1, -1),
        ],
        dim=-1,
    )
    token_of_place = torch.cat([prompt_index.flatten(), sequence_index.flatten()])
    places = torch.cat([prompt_valid.flatten(), sequence_valid.flatten()]).nonzero().squeeze(1)
    place_of_token = torch.empty_like(batch.input_ids)
    place_of_token[token_of_place[places]] = places
    (rows, longest_prompt), (sequences, longest) = prompt_index.shape, sequence_index.shape
    return AttentionPlan(
        (rows, longest_prompt), (sequences, longest), token_of_place, place_of_token, sequence_row, mask[:, None]
    )


def _padded_index(tokens: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Lay tokens out as one right-padded line per owner (0, 1, ...); owners come in ascending order."""
    lengths = torch.bincount(owner) if len(owner) else owner.new_zeros(0)
    width = int(lengths.max()) if len(lengths) else 0
    valid = torch.arange(width, device=tokens.device) < lengths[:, None]
    index = tokens.new_zeros(valid.shape)
    index[valid] = tokens
    return index, valid


def dense_mask(batch: PackedBatch) -> Tensor:
    """What each token sees, bool ``[1, 1, T, T]``, for implementations that take a mask."""
    earlier = torch.ones(batch.num_tokens, batch.num_tokens, dtype=torch.bool, device=batch.input_ids.device).tril()
    same_row = batch.row_ids[:, None] == batch.row_ids
    visible = (batch.sequence_ids == PROMPT) | (batch.sequence_ids[:, None] == batch.sequence_ids)
    return (earlier & same_row & visible)[None, None]


def flex_mask(batch: PackedBatch) -> Any:
    """What each token sees, as a ``BlockMask`` of FlexAttention, ``[1, 1, T, T]``.

    It holds which blocks of tokens see each other at all; within those the kernel asks the same rule as `dense_mask`.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    rows_T, sequences_T = batch.row_ids, batch.sequence_ids

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (sequences_T[key] == PROMPT) | (sequences_T[query] == sequences_T[key])
        return (query >= key) & (rows_T[query] == rows_T[key]) & seen

    device, count = batch.input_ids.device, batch.num_tokens
    # Compiled, the mask over all pairs of tokens is never formed; on CPU compiling takes longer than forming it.
    return create_block_mask(visible, None, None, count, count, device=device, _compile=device.type == "cuda")


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' calling convention.

    With a plan: each prompt attends to itself, each completion to its prompt and itself, at a cost of
    ``P^2 + C (P + C)`` per sequence and without a mask over all packed tokens. Without one (ordinary forwards
    of the same model) it is transformers' ``sdpa``.

    Args:
        module: The attention layer.
        query: ``[1, H, T, D]``.
        key: ``[1, K, T, D]``.
        value: ``[1, K, T, D]``.
        attention_mask: Ignored with a plan.
        scaling: Factor on the scores; ``1 / sqrt(D)`` if omitted.
        dropout: Probability of dropping an attention weight.
        plan: The gathers of this batch.
        **kwargs: Passed on without a plan.

    Returns:
        Output ``[1, T, H, D]`` and None, for the attention weights that are never formed.
    """
    if plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (t.transpose(1, 2).to(attention_dtype(t.dtype, t.device.type)) for t in (q, k, v))
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).to(query.dtype)

    (rows, longest_prompt), (sequences, longest) = plan.prompts, plan.sequences
    padded = (_ToPlaces.apply(t[0].transpose(0, 1), plan) for t in (query, key, value))  # type: ignore[no-untyped-call]
    of_prompts, of_sequences = zip(
        *(t.split([rows * longest_prompt, sequences * longest]) for t in padded), strict=True
    )
    q_RP, k_RP, v_RP = (t.view(rows, longest_prompt, *t.shape[1:]) for t in of_prompts)
    attended = [attend(q_RP, k_RP, v_RP, None).flatten(0, 1)]
    if sequences:
        q_SC, k_SC, v_SC = (t.view(sequences, longest, *t.shape[1:]) for t in of_sequences)
        k_seen, v_seen = (
            torch.cat([prompt.index_select(0, plan.sequence_row), own], dim=1)
            for prompt, own in ((k_RP, k_SC), (v_RP, v_SC))
        )
        attended.append(attend(q_SC, k_seen, v_seen, plan.mask).flatten(0, 1))
    return _ToTokens.apply(torch.cat(attended), plan)[None], None  # type: ignore[no-untyped-call]


class _ToPlaces(torch.autograd.Function):
    """Packed tokens ``[T, ...]`` into their places ``[X, ...]``; padding holds anything, and gets no gradient.

    Each token has one place, so the gradient is a gather too. That of an ordinary index adds up, element by element.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan = plan
        return tokens.index_select(0, plan.token_of_place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToTokens.apply(grad, ctx.plan), None  # type: ignore[no-untyped-call]


class _ToTokens(torch.autograd.Function):
    """The contrary: from places ``[X, ...]`` to packed tokens ``[T, ...]``."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, plan: AttentionPlan) -> Tensor:
        ctx.plan, ctx.count = plan, len(places)
        return places.index_select(0, plan.place_of_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places = grad.new_zeros(ctx.count, *grad.shape[1:])
        return places.index_copy(0, ctx.plan.place_of_token, grad), None


def attention_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What the shared-prompt attention computes in, for queries of a dtype on a kind of device."""
    # The backward pass of the CPU kernel takes three times as long in bfloat16 as in float32.
    return torch.float32 if (dtype, device) == (torch.bfloat16, "cpu") else dtype


def register() -> None:
    """Make the implementation known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
    # Ordinary forwards build the mask that sdpa takes; packed ones bring a plan instead.
    AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)

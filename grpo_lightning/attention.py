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

    Attributes:
        prompt_index: Packed index of each prompt token, padded on the right with 0, int64 ``[R, P]``.
        prompt_valid: Which of these are tokens, bool ``[R, P]``.
        sequence_index: The same for the completions, int64 ``[S, C]``.
        sequence_valid: Which of these are tokens, bool ``[S, C]``.
        sequence_row: Row of each completion, int64 ``[S]``.
        mask: What each completion token sees: prompt, then own completion, bool ``[S, 1, C, P + C]``.
        order: Position of each packed token in (prompt tokens, completion tokens), int64 ``[T]``.
    """

    prompt_index: Tensor
    prompt_valid: Tensor
    sequence_index: Tensor
    sequence_valid: Tensor
    sequence_row: Tensor
    mask: Tensor
    order: Tensor


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
    order = torch.empty_like(batch.input_ids)
    order[torch.cat([prompt_index[prompt_valid], sequence_index[sequence_valid]])] = torch.arange(
        batch.num_tokens, device=order.device
    )
    return AttentionPlan(prompt_index, prompt_valid, sequence_index, sequence_valid, sequence_row, mask[:, None], order)


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
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=True
        ).transpose(1, 2)

    q_TH, k_TK, v_TK = (t[0].transpose(0, 1) for t in (query, key, value))
    k_RP, v_RP = (t[plan.prompt_index].transpose(1, 2) for t in (k_TK, v_TK))
    prompts = attend(q_TH[plan.prompt_index].transpose(1, 2), k_RP, v_RP, None)[plan.prompt_valid]
    if not len(plan.sequence_index):
        return prompts[plan.order][None], None
    k_SC, v_SC = (
        torch.cat([prompt[plan.sequence_row], own[plan.sequence_index].transpose(1, 2)], dim=2)
        for prompt, own in ((k_RP, k_TK), (v_RP, v_TK))
    )
    completions = attend(q_TH[plan.sequence_index].transpose(1, 2), k_SC, v_SC, plan.mask)[plan.sequence_valid]
    return torch.cat([prompts, completions])[plan.order][None], None


def register() -> None:
    """Make the implementation known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
    # Ordinary forwards build the mask that sdpa takes; packed ones bring a plan instead.
    AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)

"""LoRA layers of vLLM's CPU backend as plain matrix products. Imported only inside vLLM's processes.

vLLM's own CPU wrapper gathers a copy of A and B for every token (``lora_weights[indices]``) and multiplies
with an einsum. During GRPO nearly all tokens of a step use one adapter, where two matrix products for all slices of a
layer do the same work. Rows that use another adapter are a second pair; rows of the base model (slot -1) get no
product at all, whereas indexing with -1 would give them the last slot's adapter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = list[tuple[int, torch.Tensor | None]]
"""Adapter slots in use, each with its rows (None: all of them)."""


def group_rows(slots: torch.Tensor) -> Rows:
    """Rows of each adapter slot. Slot -1, the base model, has no entry.

    Args:
        slots: Adapter slot of each row, int64, shape ``[rows]``.
    """
    used = sorted(set(slots.tolist()))
    if len(used) == 1:
        return [(used[0], None)] if used[0] >= 0 else []
    return [(slot, (slots == slot).nonzero().squeeze(1)) for slot in used if slot >= 0]


def joint_factors(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], widths: Sequence[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair of matrices for all slices of a layer, in the dtype of its input.

    The slices' A stand beside one another, their B along a diagonal, so two products do for the layer. Where the dtype
    is narrower than the adapter's, a factor becomes its rounded value and what rounding lost, as in the trainer
    (`lora_linear`): small updates of the adapter would round away otherwise.

    Args:
        a: First factors, each ``[rank, in_features]``.
        b: Second factors, each ``[slice, rank]``; vLLM pads adapter and layer apart, the overlap is the real part.
        widths: Widths of the slices.
        dtype: Dtype of the layer's input.

    Returns:
        ``[in_features, P]`` and ``[Q, sum(widths)]``, for `widened`.
    """
    joint_a = torch.cat(list(a)).T
    joint_b = joint_a.new_zeros(joint_a.shape[1], sum(widths))
    row = column = 0
    for factor, width in zip(b, widths, strict=True):
        common = min(width, factor.shape[0])
        joint_b[row : row + factor.shape[1], column : column + common] = factor[:common].T
        row, column = row + factor.shape[1], column + width
    if dtype == joint_a.dtype:
        return joint_a.contiguous(), joint_b
    rounded_a, rounded_b = joint_a.to(dtype), joint_b.to(dtype)
    lost_a, lost_b = (joint_a - rounded_a).to(dtype), (joint_b - rounded_b).to(dtype)
    return torch.cat([rounded_a, lost_a], 1), torch.cat([rounded_b, rounded_b, lost_b])


def widened(hidden: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product with the first of `joint_factors`, as wide as the second takes it."""
    missing = b.shape[0] - hidden.shape[1]
    return torch.cat([hidden, hidden[:, :missing]], 1) if missing else hidden


class GroupedPunicaWrapperCPU(PunicaWrapperCPU):  # type: ignore[misc]
    """`PunicaWrapperCPU` that computes each adapter's rows with one matrix product."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_rows: Rows = []
        self._sampler_rows: Rows = []
        self._factors: dict[tuple[Any, ...], tuple[list[int], tuple[torch.Tensor, torch.Tensor]]] = {}

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Group the rows of the coming step by adapter slot, once for all layers."""
        super().update_metadata(*args, **kwargs)
        self._token_rows = group_rows(self.token_lora_indices)
        self._sampler_rows = group_rows(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """``y[:, slice] += scale * (x @ A.T) @ B.T`` for the rows of each adapter.

        Args:
            y: Output of the base layer, updated in place, shape ``[tokens, sum(output_slices)]``.
            x: Input of the layer, shape ``[tokens, in_features]``.
            lora_a_stacked: One ``[slots, 1, rank, in_features]`` per output slice.
            lora_b_stacked: One ``[slots, 1, slice, rank]`` per output slice.
            scale: Extra factor on the product.
            output_slices: Widths of the slices of ``y``.
        """
        for slot, rows in self._token_rows:
            a_IP, b_PO = self._joint_factors(lora_a_stacked, lora_b_stacked, slot, x.dtype, output_slices)
            hidden = widened((x if rows is None else x[rows]) @ a_IP, b_PO)
            if rows is None:
                y.addmm_(hidden, b_PO, alpha=scale)
            else:
                y.index_add_(0, rows, hidden @ b_PO, alpha=scale)

    def _joint_factors(
        self,
        a_stacked: tuple[torch.Tensor, ...],
        b_stacked: tuple[torch.Tensor, ...],
        slot: int,
        dtype: torch.dtype,
        widths: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`joint_factors` of a layer's adapter, computed once for each adapter that is loaded."""
        key = (a_stacked[0].data_ptr(), slot, dtype)
        # Loading an adapter writes into these tensors.
        version = [tensor._version for tensor in (*a_stacked, *b_stacked)]
        known = self._factors.get(key)
        if known is None or known[0] != version:
            factors = joint_factors([a[slot, 0] for a in a_stacked], [b[slot, 0] for b in b_stacked], widths, dtype)
            known = self._factors[key] = (version, factors)
        return known[1]

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> None:
        """The same for the logits ``[rows, vocabulary]``; free where the adapter leaves the head alone."""
        for slot, rows in self._sampler_rows:
            inputs = (x if rows is None else x[rows]).to(lora_a_stacked.dtype)
            hidden = (inputs @ lora_a_stacked[slot, 0].T).mul_(scale)
            # vLLM zeroes the slot of an adapter without a head.
            if hidden.any():
                _add_rows(y, hidden, lora_b_stacked[slot, 0], rows)


def _add_rows(y: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None) -> None:
    # vLLM pads adapter and layer widths separately; the overlap is the real part.
    common = min(y.shape[1], b.shape[0])
    delta = (hidden @ b[:common].T).to(y.dtype)
    target = y[:, :common]
    if rows is None:
        target.add_(delta)
    else:
        target.index_add_(0, rows, delta)

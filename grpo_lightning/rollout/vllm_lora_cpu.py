"""LoRA layers of vLLM's CPU backend as plain matrix products. Imported only inside vLLM's processes.

vLLM's own CPU wrapper gathers a copy of A and B for every token (``lora_weights[indices]``) and multiplies
with an einsum. During GRPO nearly all tokens of a step use one adapter, where two matrix products do the same
work. Rows that use another adapter are a second product; rows of the base model (slot -1) get no product at
all, whereas indexing with -1 would give them the last slot's adapter.
"""

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


class GroupedPunicaWrapperCPU(PunicaWrapperCPU):  # type: ignore[misc]
    """`PunicaWrapperCPU` that computes each adapter's rows with one matrix product."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_rows: Rows = []
        self._sampler_rows: Rows = []

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
            inputs = (x if rows is None else x[rows]).to(lora_a_stacked[0].dtype)
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                _add_rows(y[:, start : start + width], (inputs @ a[slot, 0].T).mul_(scale), b[slot, 0], rows)
                start += width

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

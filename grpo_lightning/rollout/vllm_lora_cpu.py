"""LoRA layers of vLLM's CPU backend as plain matrix products. Imported only inside vLLM's processes.

vLLM's own CPU wrapper gathers a copy of A and B for every token (``lora_weights[indices]``) and multiplies
with an einsum. During GRPO nearly all tokens of a step use one adapter, where two matrix products for all slices of a
layer do the same work. Rows that use another adapter are a second pair; rows of the base model (slot -1) get no
product at all, whereas indexing with -1 would give them the last slot's adapter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from grpo_lightning.low_rank import parts

Rows = list[tuple[int, torch.Tensor | None]]
"""Adapter slots in use, each with its rows (None: all of them)."""

_LAYOUTS = 32
"""Numbers of tokens that oneDNN keeps its plans for, as for vLLM's own layers."""


def group_rows(slots: torch.Tensor) -> Rows:
    """Rows of each adapter slot. Slot -1, the base model, has no entry.

    Args:
        slots: Adapter slot of each row, int64, shape ``[rows]``.
    """
    used = sorted(set(slots.tolist()))
    if len(used) == 1:
        return [(used[0], None)] if used[0] >= 0 else []
    return [(slot, (slots == slot).nonzero().squeeze(1)) for slot in used if slot >= 0]


_FEW = 256
"""Up to so many tokens, as in decoding, a product takes as long as laying out its matrix."""


class JointAdapter:
    """The adapter of all slices of a layer as two matrix products, in the dtype of the layer's input.

    The slices' A stand beside one another, their B along a diagonal. Where the dtype is narrower than the adapter's,
    each factor enters as its rounded value and what rounding lost: small updates of the adapter would be lost
    otherwise. The result between the two products is rounded to the dtype, as the layer's output is.

    Args:
        a: First factors, each ``[rank, in_features]``.
        b: Second factors, each ``[slice, rank]``; vLLM pads adapter and layer apart, the overlap is the real part.
        widths: Widths of the slices.
        dtype: Dtype of the layer's input.
    """

    def __init__(
        self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], widths: Sequence[int], dtype: torch.dtype
    ) -> None:
        joint_a = torch.cat(list(a)).T
        joint_b = joint_a.new_zeros(joint_a.shape[1], sum(widths))
        row = column = 0
        for factor, width in zip(b, widths, strict=True):
            common, rank = min(width, len(factor)), factor.shape[1]
            joint_b[row : row + rank, column : column + common] = factor[:common].T
            row, column = row + rank, column + width
        self._rank = len(joint_b)
        of_a, of_b = parts(joint_a, dtype), parts(joint_b, dtype)
        # Without the product of what was lost twice.
        self._first, self._second = torch.cat(of_a, 1), torch.cat([of_b[0]] * (len(of_a) - 1) + of_b)
        self._few_first, self._few_second = _laid_out(self._first), _laid_out(self._second)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapter's part to the layer's output in place.

        Args:
            y: Output, ``[tokens, sum(widths)]``.
            x: Input, ``[tokens, in_features]``.
        """
        few = len(x) <= _FEW
        hidden = self._few_first(x) if few else x @ self._first
        if hidden.shape[1] > self._rank:
            # What was lost of A stays a number of its own: added to the rounded result it would be lost again.
            hidden = torch.cat([hidden, hidden[:, : self._rank]], 1)
        if few:
            y.add_(self._few_second(hidden))
        else:
            y.addmm_(hidden, self._second)


def _laid_out(matrix: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """``x -> x @ matrix``, with the matrix laid out once for the processor's matrix units where it has them."""
    if matrix.dtype != torch.bfloat16 or not ops._supports_onednn:
        return lambda x: x @ matrix
    handler = ops.create_onednn_mm(matrix, _LAYOUTS)
    return lambda x: ops.onednn_mm(handler, x, None)


class GroupedPunicaWrapperCPU(PunicaWrapperCPU):  # type: ignore[misc]
    """`PunicaWrapperCPU` that computes each adapter's rows with one matrix product."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_rows: Rows = []
        self._sampler_rows: Rows = []
        self._adapters: dict[tuple[Any, ...], tuple[list[int], JointAdapter]] = {}

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
            adapter = self._adapter(lora_a_stacked, lora_b_stacked, slot, scale, y.dtype, output_slices)
            inputs, outputs = (x, y) if rows is None else (x[rows], y[rows])
            adapter.add_to(outputs, inputs.to(y.dtype))
            if rows is not None:
                y[rows] = outputs

    def _adapter(
        self,
        a_stacked: tuple[torch.Tensor, ...],
        b_stacked: tuple[torch.Tensor, ...],
        slot: int,
        scale: float,
        dtype: torch.dtype,
        widths: tuple[int, ...],
    ) -> JointAdapter:
        """The adapter of a layer, prepared once each time that one is loaded."""
        key = (a_stacked[0].data_ptr(), slot, scale, dtype)
        # Loading an adapter writes into these tensors.
        version = [tensor._version for tensor in (*a_stacked, *b_stacked)]
        known = self._adapters.get(key)
        if known is None or known[0] != version:
            a, b = [stack[slot, 0] for stack in a_stacked], [stack[slot, 0] * scale for stack in b_stacked]
            known = self._adapters[key] = (version, JointAdapter(a, b, widths, dtype))
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

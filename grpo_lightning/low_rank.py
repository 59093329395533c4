"""A product with two thin factors that are more exact than what they are multiplied with.

Shapes: ``T`` tokens, ``I`` inputs, ``O`` outputs, ``R`` rank.
"""

import torch
from torch import Tensor


class LowRank:
    """What a LoRA adapter adds to a layer, ``(x A^T) B^T``, computed in the dtype of ``x``.

    Where that is narrower than the factors', each factor enters as two numbers of that dtype: its rounded value and
    what rounding lost. So does the intermediate result. Otherwise an update of the adapter that is small beside its
    weights would be lost. What remains is rounded to about the square of the dtype's precision: 2e-5 for bfloat16.

    Args:
        a_RI: First factor, ``[R, I]``.
        b_OR: Second factor, ``[O, R]``.
        dtype: Dtype of ``x``.

    Attributes:
        a_IR: First factor, rounded to the dtype.
        b_RO: Second factor, rounded to the dtype.
    """

    def __init__(self, a_RI: Tensor, b_OR: Tensor, dtype: torch.dtype) -> None:
        a, b = parts(a_RI.T, dtype), parts(b_OR.T, dtype)
        self.a_IR, self.b_RO = a[0], b[0]
        self._narrow = len(a) > 1
        self._first = torch.cat(a, 1)
        # Without the product of what was lost twice.
        self._second = torch.cat([b[0], *b]) if self._narrow else b[0]

    def hidden(self, x_TI: Tensor) -> Tensor:
        """The intermediate result for `add_to`; its first ``R`` columns are the result in the dtype of ``x``."""
        both = x_TI @ self._first
        if not self._narrow:
            return both
        rank = self.a_IR.shape[1]
        rounded = both[:, :rank]
        # The sum is rounded once, after the rounded product was taken from the exact one.
        lost = torch.addmm(rounded, x_TI, self.a_IR, beta=-1).add_(both[:, rank:])
        return torch.cat([rounded, lost, rounded], 1)

    def add_to(self, y_TO: Tensor, hidden: Tensor) -> None:
        """Add the adapter's part to a layer's output in place.

        Args:
            y_TO: Output, ``[T, O]``.
            hidden: What `hidden` gave.
        """
        y_TO.addmm_(hidden, self._second)


def parts(factor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """A factor in a dtype: as it is, or where that is narrower, its rounded value and what rounding lost.

    Args:
        factor: Of any shape.
        dtype: Of the parts.
    """
    rounded = factor.to(dtype)
    return [rounded] if torch.promote_types(factor.dtype, dtype) == dtype else [rounded, (factor - rounded).to(dtype)]

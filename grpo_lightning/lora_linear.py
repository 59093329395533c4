"""A linear layer with a LoRA adapter as one differentiable operation.

PEFT's own layer computes the adapter in the adapter's float32: beside a bfloat16 base it copies every input and output
of every layer to float32 and back, which costs more than the products themselves.

Shapes: ``T`` tokens (all leading dimensions), ``I`` inputs, ``O`` outputs, ``R`` rank.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """A frozen linear layer with its adapter.

        y = x W^T + bias + s (x A^T) B^T

    The products are computed in the dtype of ``x``. Where that is narrower than the adapter's, each factor enters as
    two numbers of that dtype, its rounded value and what rounding lost: a small update then changes the result, as it
    would not if the factor were rounded. The gradient reaches ``x``, ``A`` and ``B``; the last two have it in their own
    dtype.

    Args:
        x: Input, ``[..., I]``.
        weight_OI: Frozen weight, same dtype, ``[O, I]``.
        bias_O: Frozen bias, same dtype, ``[O]``.
        a_RI: First factor of the adapter, ``[R, I]``.
        b_OR: Second factor, ``[O, R]``.
        scale: Factor ``s``.

    Returns:
        ``[..., O]``, dtype of ``x``.
    """
    y: Tensor = _LoRALinear.apply(x, weight_OI, bias_O, a_RI, b_OR, scale)  # type: ignore[no-untyped-call]
    return y


def _parts(factor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """A factor in a dtype: as it is, or where that is narrower, rounded, and what rounding lost."""
    rounded = factor.to(dtype)
    return [rounded] if rounded.dtype == factor.dtype else [rounded, (factor - rounded).to(dtype)]


def _add_product(y_TJ: Tensor, h_TR: Tensor, factor_RJ: list[Tensor]) -> None:
    """``y += h @ factor`` in place; with two parts of the factor there are two of ``h`` beside one another."""
    if len(factor_RJ) == 1:
        y_TJ.addmm_(h_TR, factor_RJ[0])
    else:
        rounded, lost = factor_RJ
        # Without the product of what was lost twice.
        y_TJ.addmm_(torch.cat([h_TR, h_TR[:, : len(lost)]], 1), torch.cat([rounded, rounded, lost]))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        a, b = _parts(a_RI, x.dtype), _parts(b_OR, x.dtype)
        h_TR = x_TI @ torch.cat(a).T * scale
        y_TO = nn.functional.linear(x_TI, weight_OI, bias_O)
        _add_product(y_TO, h_TR, [part.T for part in b])
        ctx.save_for_backward(x_TI, weight_OI, h_TR, *a, *b)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a_RI.dtype, b_OR.dtype)
        return y_TO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, h_TR, *factors = ctx.saved_tensors
        a, b = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        grad_TO = grad.reshape(-1, grad.shape[-1])
        of_h_TR = grad_TO @ torch.cat(b, 1) * ctx.scale
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x_TI = grad_TO @ weight_OI
            _add_product(of_x_TI, of_h_TR, a)
            of_x = of_x_TI.view(ctx.shape)
        rank = len(a[0])
        of_a = (of_h_TR.T @ x_TI).to(ctx.dtypes[0]).unflatten(0, (-1, rank)).sum(0)
        of_b = (grad_TO.T @ h_TR).to(ctx.dtypes[1]).unflatten(1, (-1, rank)).sum(1)
        return of_x, None, None, of_a, of_b, None


class FusedLoRALinear(Linear):  # type: ignore[misc]
    """PEFT's layer, computed by `lora_linear` where that means the same: one plain adapter on a frozen `nn.Linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, ``[..., O]``."""
        name = self._plain_adapter(x) if not args and not kwargs else None
        if name is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base = self.base_layer
        return lora_linear(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )

    def _plain_adapter(self, x: Tensor) -> str | None:
        """Name of the one adapter that stands beside the base layer and does what `lora_linear` does, or None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or type(self.base_layer) is not nn.Linear:
            return None
        name, weight = names[0], self.base_layer.weight
        drops = self.training and getattr(self.lora_dropout[name], "p", 0.0) > 0
        other = name in self.lora_variant or self.lora_B[name].bias is not None or weight.requires_grad
        # Under autocast the dtypes that the operation sees are not those that it should compute in.
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        # Beside a narrower base PEFT computes the adapter in its own dtype: rounding between its factors would look to
        # the doctor like an engine that rounds.
        narrow = self.lora_A[name].weight.dtype != x.dtype
        if drops or other or casts or narrow or x.dtype != weight.dtype:
            return None
        return str(name)


def fuse(model: nn.Module) -> None:
    """Have a model's LoRA layers that are PEFT's own for `nn.Linear` computed by `lora_linear`.

    Args:
        model: Changed in place; parameters, their names and what PEFT does with them stay the same.
    """
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLoRALinear

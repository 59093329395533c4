"""A linear layer with a LoRA adapter as one differentiable operation.

PEFT's own layer computes the adapter in the adapter's float32: beside a bfloat16 base it copies every input and output
of every layer to float32 and back, which costs more than the products themselves.

Shapes: ``T`` tokens (all leading dimensions), ``I`` inputs, ``O`` outputs, ``R`` rank.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from grpo_lightning.low_rank import LowRank


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """A frozen linear layer with its adapter.

        y = x W^T + bias + s (x A^T) B^T

    The products are computed in the dtype of ``x``. Where that is narrower than the adapter's, the adapter's part is
    still as exact as if it were not (`LowRank`); gradients are as exact as the dtype of ``x``. They reach ``x``, ``A``
    and ``B``; the last two have theirs in their own dtype.

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


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_TI, adapter = x.reshape(-1, x.shape[-1]), LowRank(a_RI, b_OR * scale, x.dtype)
        hidden = adapter.hidden(x_TI)
        y_TO = nn.functional.linear(x_TI, weight_OI, bias_O)
        adapter.add_to(y_TO, hidden)
        ctx.save_for_backward(x_TI, weight_OI, hidden[:, : len(a_RI)], adapter.a_IR, adapter.b_RO)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a_RI.dtype, b_OR.dtype)
        return y_TO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, hidden_TR, a_IR, b_RO = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        of_hidden_TR = grad_TO @ b_RO.T
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (grad_TO @ weight_OI).addmm_(of_hidden_TR, a_IR.T).view(ctx.shape)
        of_a = (of_hidden_TR.T @ x_TI).to(ctx.dtypes[0])
        of_b = (grad_TO.T @ hidden_TR).to(ctx.dtypes[1]) * ctx.scale
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
        drops = getattr(self.lora_dropout[name], "p", 0.0) > 0 and self.training
        other = name in self.lora_variant or self.lora_B[name].bias is not None or weight.requires_grad
        # Under autocast the dtypes that the operation sees are not those that it should compute in.
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if drops or other or casts or x.dtype != weight.dtype:
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

"""The model's layers compiled by torch.compile, where packed batches go through them.

Between its matrix products a layer makes a dozen passes over every activation; compiled, it makes one or two.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lightning.attention import SHARED_PROMPT
from grpo_lightning.errors import ConfigurationError

FEWEST_TOKENS = 256
"""Smaller batches stay as they are: each other way of computing has to be compiled, and a few tokens gain nothing."""

_scoring = ContextVar("scoring", default=False)


@contextlib.contextmanager
def as_in_training() -> Iterator[None]:
    """Within this context passes without gradients are computed as those of training are, to the last bit.

    For log-probabilities that the loss compares with its own.
    """
    token = _scoring.set(True)
    try:
        yield
    finally:
        _scoring.reset(token)


def compile_layers(model: Any) -> None:
    """Have a model's repeated layers compiled for packed batches; all of them share one graph.

    Only forward passes of `FEWEST_TOKENS` and more that bring an `AttentionPlan` are compiled, and of those without
    gradients only the ones `as_in_training`: others, such as generation, have too many shapes. See the guide to
    regional compilation (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).

    Args:
        model: A causal language model of transformers; changed in place. Parameters and their names stay the same.

    Raises:
        ConfigurationError: If the model does not name its layers, or has another attention than the shared-prompt one.
    """
    if model.config._attn_implementation != SHARED_PROMPT:
        raise ConfigurationError(
            f"expected attn_implementation={SHARED_PROMPT!r} with torch_compile, "
            f"but got {model.config._attn_implementation!r}"
        )
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigurationError(
            f"torch_compile compiles the layers that a model names, but {type(model).__name__} names none that it has; "
            "leave torch_compile out"
        )
    for kind in {type(layer) for layer in layers}:
        compiled = _compiled(kind)
        for layer in layers:
            if type(layer) is kind:
                layer.__class__ = compiled


def require_compiler() -> None:
    """Compile and run a function on the CPU, so that what is missing there shows before anything expensive starts.

    Raises:
        ConfigurationError: If that fails, with the reason.
    """
    values = torch.zeros(64)
    try:
        torch.compile(_probe)(values)
    except Exception as error:
        # Compilers, their headers and their drivers fail in all ways.
        cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigurationError(
            f"expected a C++ compiler that torch.compile can use, but it says: {cause}. Install g++ and Python's "
            "headers (on Debian: apt install g++ python3-dev), or leave torch_compile out"
        ) from error


def _probe(values: Tensor) -> Tensor:
    return values.sin() * 2


@contextlib.contextmanager
def _one_mode(layer: nn.Module) -> Iterator[None]:
    """Attention that drops nothing is the same in both modes, and would be compiled for each."""
    evaluating = [m for m in layer.children() if getattr(m, "attention_dropout", None) == 0.0 and not m.training]
    for module in evaluating:
        module.training = True
    try:
        yield
    finally:
        for module in evaluating:
            module.training = False


def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of layers under the same name, for FSDP and transformers look for it."""
    run: Callable[..., Tensor] = torch.compile(kind.forward, dynamic=True)

    class Compiled(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            wanted = torch.is_grad_enabled()
            small = kwargs.get("plan") is None or hidden_states.shape[1] < FEWEST_TOKENS
            if small or not (wanted or _scoring.get()):
                plain: Tensor = super().forward(hidden_states, *args, **kwargs)
                return plain
            if not (wanted and hidden_states.requires_grad):
                # The first layer, and passes without gradients, would have graphs of their own.
                hidden_states = hidden_states.detach().requires_grad_()
            with torch.enable_grad(), _one_mode(self):
                output = run(self, hidden_states, *args, **kwargs)
            return output if wanted else output.detach()

    Compiled.__name__, Compiled.__qualname__ = kind.__name__, kind.__qualname__
    return Compiled

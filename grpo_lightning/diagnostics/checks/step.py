"""An optimizer step does what it should to the parameters."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from grpo_lightning.diagnostics.verdict import Status, Verdict

ROUNDED = (torch.bfloat16, torch.float16)
"""Dtypes in which a usual update is smaller than the distance of neighbouring numbers."""

MIN_ABSORBED = 0.5
"""Share of a step that must arrive. In float32 all of it does; where rounding decides, half or less."""

COARSE_SHARE = 0.999
"""Share of the elements of float32 parameters that are numbers of a 16-bit dtype after a step; by chance 1e-4."""

_PROBED = 1024

BEYOND_BOUND = 2.0
"""Learning rates by which a step may exceed `adam_bound`. Usual weight decay adds 0.1 at most; rounding may double a
step that is about as large as the distance of neighbouring numbers, and a usual step is one learning rate."""


class StepSize:
    """Parameters and gradients as they are before a step, to see afterwards what it did.

    Args:
        parameters: What is trained, by name.
        optimizer: What will take the step.

    Attributes:
        optimizer: The same.
        lr: The step's largest learning rate; schedulers step before anybody can look at it again.
        norm: Norm of the step, once it was `take`n.
        gradient_norm: Norm of the gradient before clipping.
        loss_change: Change of the loss to first order: the product of step and gradient.
        elements: Elements with a gradient, or that moved.
        counted: Whether the optimizer counted the step; None if it counts none.
        first: Whether it is the optimizer's first step, so that it has no momentum yet.
    """

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.lr = max(float(group["lr"]) for group in optimizer.param_groups)
        self._lr_of = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self._before = {
            name: (p.detach().clone(), p.grad.detach().clone()) for name, p in parameters.items() if p.grad is not None
        }
        self._steps = self._count()
        self.first = not any(optimizer.state.values())
        self.norm = self.gradient_norm = self.loss_change = 0.0
        self.elements = 0
        self.counted: bool | None = None

    @property
    def before(self) -> dict[str, Tensor]:
        """The parameters with a gradient as they were before."""
        return {name: old for name, (old, _) in self._before.items()}

    def take(self, parameters: Mapping[str, Tensor]) -> None:
        """Compare with the parameters as they are after the step."""
        sums = []
        for name, (old, grad) in self._before.items():
            step, slope = (parameters[name].detach() - old).flatten(), grad.flatten()
            elements = torch.count_nonzero(step.logical_or(slope))
            step, slope = step.double(), slope.double()
            sums.append(torch.stack([torch.dot(step, step), torch.dot(slope, slope), torch.dot(step, slope), elements]))
        if sums:
            # All at once: a GPU is waited for once.
            squares, gradient_squares, self.loss_change, elements = torch.stack(sums).sum(0).tolist()
            self.norm, self.gradient_norm, self.elements = squares**0.5, gradient_squares**0.5, int(elements)
        steps = self._count()
        counts = self.adam or any("step" in s for s in self.optimizer.state.values())
        self.counted = steps > self._steps if counts else None

    @property
    def cosine(self) -> float:
        """Between step and gradient: -1 if the step goes straight down."""
        size = self.norm * self.gradient_norm
        return self.loss_change / size if size > 0 else 0.0

    @property
    def adam(self) -> bool:
        """Whether the optimizer is of Adam's kind."""
        return isinstance(self.optimizer, Adam)

    @property
    def max_relative(self) -> float:
        """Largest `relative` that comes from gradients; infinite for optimizers not of Adam's kind."""
        if not self.adam:
            return math.inf
        return BEYOND_BOUND + max(adam_bound(*map(float, group["betas"])) for group in self.optimizer.param_groups)

    @property
    def relative(self) -> float:
        """Size of the step beside a plain one: a learning rate in each element for Adam, else the gradient."""
        size = self.lr * (math.sqrt(self.elements) if self.adam else self.gradient_norm)
        return self.norm / size if size > 0 else 0.0

    def absorbed(self, parameters: Mapping[str, Tensor]) -> tuple[float, float] | None:
        """For parameters in 16 bits: the share of the intended step that arrived, and of elements that did not move.

        None without such parameters, or where the optimizer's intention is unknown.
        """
        if self.counted is False:
            return None
        product = squares = 0.0
        still = elements = 0
        for name, (old, grad) in self._before.items():
            parameter = parameters[name]
            intended = self._intended(parameter, old) if old.dtype in ROUNDED else None
            if intended is None:
                continue
            asked = grad != 0
            step = (parameter.detach() - old)[asked].double()
            product += float((step * intended[asked]).sum())
            squares += float(intended[asked].square().sum())
            still += int((step == 0).sum())
            elements += int(asked.sum())
        return (product / squares, still / elements) if squares > 0 else None

    def rounded(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether parameters in float32 hold the values of a 16-bit dtype alone after a step that had others in mind.

        One parameter that does not answers for all; it takes a look at a few of its elements.
        """
        seen = False
        for name, (old, grad) in self._before.items():
            parameter = parameters[name].detach()
            if old.dtype is not torch.float32 or self.counted is False:
                continue
            if not _mostly_coarse(*(t.flatten()[:_PROBED] for t in (parameter, grad != 0))):
                return False
            intended = self._intended(parameters[name], old)
            if intended is None:
                return False
            # A step too small for float32 leaves what was there, coarse or not.
            fine = (grad != 0) & ~_is_coarse((old.double() + intended).float())
            if not _mostly_coarse(parameter, fine):
                return False
            seen |= bool(fine.any())
        return seen

    def _intended(self, parameter: Tensor, old: Tensor) -> Tensor | None:
        """The optimizer's step before it was rounded."""
        lr = self._lr_of.get(id(parameter))
        group = next((g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])), None)
        if lr is None or group is None or parameter.grad is None:
            return None
        state = self.optimizer.state.get(parameter, {})
        if self.adam and "exp_avg" in state:
            beta1, beta2 = (float(beta) for beta in group["betas"])
            steps = float(state["step"])
            mean = state["exp_avg"].double() / (1 - beta1**steps)
            spread = (state["exp_avg_sq"].double() / (1 - beta2**steps)).sqrt()
            step: Tensor = -lr * mean / (spread + float(group["eps"]))
            return (
                step - lr * float(group["weight_decay"]) * old.double() if isinstance(self.optimizer, AdamW) else step
            )
        if isinstance(self.optimizer, SGD):
            direction = state.get("momentum_buffer")
            return -lr * (parameter.grad if direction is None else direction).double()
        return None

    def _count(self) -> float:
        return sum(float(state["step"]) for state in self.optimizer.state.values() if "step" in state)


def adam_bound(beta1: float, beta2: float) -> float:
    """Largest step of Adam in an element, in learning rates.

        |m| / sqrt(v) <= (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2))

    by the Cauchy-Schwarz inequality, for any sequence of gradients and with the corrections of the first steps; reached
    by gradients that grow by ``beta2 / beta1`` a step. After a single one ``(1 - beta1) / sqrt(1 - beta2)`` is left of
    it, the bound for sparse gradients in section 2.1 of `Kingma and Ba (2015) <https://arxiv.org/abs/1412.6980>`_.

    Args:
        beta1: Decay of the mean, in [0, 1).
        beta2: Decay of the mean square, in [0, 1).

    Returns:
        At least 1; infinite if ``beta1^2 >= beta2``, where growing gradients outrun their mean square.
    """
    rest = beta2 - beta1**2
    if rest <= 0:
        return math.inf if beta1 else 1.0
    return (1 - beta1) * math.sqrt(beta2 / ((1 - beta2) * rest))


def _is_coarse(values: Tensor) -> Tensor:
    return torch.stack([values.to(dtype).float() == values for dtype in ROUNDED]).any(0)


def _mostly_coarse(values: Tensor, chosen: Tensor) -> bool:
    """Whether at least `COARSE_SHARE` of the chosen elements are numbers of a 16-bit dtype."""
    return bool(_is_coarse(values[chosen]).double().mean() >= COARSE_SHARE) if bool(chosen.any()) else True


def share_kept(
    before: Mapping[str, Tensor], left: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> tuple[float, float]:
    """How much of a step is still there: its share, and the norm of what changed since.

    Args:
        before: The parameters before the step, by name.
        left: As the step left them.
        now: As they are now.
    """
    if all(torch.equal(now[name], weights) for name, weights in left.items()):
        return 1.0, 0.0
    product = squares = strange = 0.0
    for name, old in before.items():
        current, start = now[name].detach().double(), old.double()
        step = left[name].double() - start
        squares += float(step.square().sum())
        product += float(((current - start) * step).sum())
        strange += float((current - left[name].double()).square().sum())
    return (product / squares if squares > 0 else 1.0), strange**0.5


def check_moved(
    *,
    grad_norm: float,
    lr: float,
    update_norm: float,
    updates: int,
    counted: bool | None = None,
    absorbed: tuple[float, float] | None = None,
    rounded: bool = False,
) -> Verdict:
    """An optimizer step with a gradient and a learning rate moves the parameters, and as far as it means to.

    Args:
        grad_norm: Norm of the gradient.
        lr: Learning rate.
        update_norm: Norm of the step.
        updates: The policy's version.
        counted: Whether the optimizer counted the step; None if it counts none.
        absorbed: `StepSize.absorbed`.
        rounded: `StepSize.rounded`.
    """
    name = "parameters move"
    if grad_norm == 0 or lr == 0:
        return Verdict(name, Status.NO_POWER, "Learning rate or gradient is 0: nothing should move.")
    shown: dict[str, float | int | str] = {
        "gradient norm": grad_norm,
        "learning rate": lr,
        "update norm": update_norm,
        "updates": updates,
    }
    ruled_out = (f"warm-up (the learning rate is {lr:.3g})", f"no gradient (its norm is {grad_norm:.3g})")
    if absorbed is not None and absorbed[0] < MIN_ABSORBED:
        shown |= {"share of the step that arrived": absorbed[0], "expected at least": MIN_ABSORBED}
        return Verdict(
            name,
            Status.FAIL,
            f"Updates round away: of the elements with a gradient {absorbed[1]:.0%} did not change, because the "
            "parameters' 16-bit dtype has no number that near.",
            "Keep what is trained in float32; the base model may be in 16 bits.",
            shown | {"elements that did not change": absorbed[1]},
            cause="updates_absorbed",
            ruled_out=ruled_out,
        )
    if rounded:
        return Verdict(
            name,
            Status.FAIL,
            "The parameters are float32, but after the step they hold the numbers of a 16-bit dtype alone: something "
            "rounds them, and small updates are lost.",
            "Look for a conversion of the weights after the step, or for a master copy in 16 bits that is copied back.",
            shown | {"share of 16-bit numbers, at least": COARSE_SHARE},
            cause="updates_absorbed",
            ruled_out=(*ruled_out, "weights loaded from a 16-bit file (elements that must have changed are counted)"),
        )
    if update_norm > 0:
        return Verdict(name, Status.PASS)
    message = "The optimizer step changed no trainable parameter, although neither gradient nor learning rate is 0."
    if counted is False:
        return Verdict(
            name,
            Status.FAIL,
            f"{message} The optimizer did not count a step: it was skipped.",
            "Look at overrides of optimizer_step and configure_gradient_clipping, at what clears gradients before the "
            "step, and at a guard or loss scaler that skips steps.",
            shown | {"counted by the optimizer": "no"},
            cause="skipped_steps",
            ruled_out=ruled_out,
        )
    return Verdict(
        name,
        Status.FAIL,
        message,
        "Check that the optimizer holds the policy's trainable parameters, and that their dtype can take the update.",
        shown,
        cause="parameters_stuck",
        ruled_out=ruled_out,
    )


def check_kept(share: float, since: float, step_norm: float) -> Verdict:
    """What a step changed is still changed when the next update begins.

    Args:
        share: Share of the step that is still there.
        since: Norm of what changed since, outside the optimizer.
        step_norm: Norm of the step.
    """
    name = "steps are kept"
    if share >= 0.5:
        return Verdict(name, Status.PASS)
    noisy = abs(since - step_norm) > 1e-6 * step_norm
    return Verdict(
        name,
        Status.FAIL,
        "The last optimizer step was undone before this update"
        + (", and noise was added to the parameters: the ratios vary, but nothing is learned." if noisy else "."),
        "Look for callbacks that load, swap or perturb weights between optimizer steps.",
        {
            "share of the step that is left": share,
            "expected at least": 0.5,
            "norm of the step": step_norm,
            "norm of what changed since": since,
        },
        cause="frozen_behind_noise" if noisy else "parameters_stuck",
        ruled_out=("ParameterPerturbation on a policy that learns (it leaves the steps in place)",),
    )


def check_step_size(relative: float, *, min_relative: float, max_relative: float, small: int, needed: int) -> Verdict:
    """The step is neither tiny beside what the optimizer makes of a gradient, nor made of something else.

    Args:
        relative: `StepSize.relative`.
        min_relative: Smallest size that changes anything.
        max_relative: `StepSize.max_relative`.
        small: Updates in a row that were smaller than the smallest, this one included.
        needed: How many decide.
    """
    name = "step size"
    if small >= needed:
        return Verdict(
            name,
            Status.FAIL,
            f"{small} steps in a row were smaller than {min_relative:g} of what the learning rate stands for.",
            "The gradient is clipped away, or tiny beside Adam's eps: look at gradient_clip_val and at the scale of "
            "the loss.",
            {"relative size of the step": relative, "expected at least": min_relative, "updates in a row": small},
            cause="step_too_small",
            ruled_out=("warm-up (the size is relative to the learning rate)",),
        )
    if relative > max_relative:
        return Verdict(
            name,
            Status.FAIL,
            "The steps are hardly the gradient's: Adam moves an element by about the learning rate, but these move "
            f"them by {relative:.3g} of it.",
            "Look at weight_decay, which also is multiplied by the learning rate, and at what else changes the "
            "parameters during the step.",
            {"relative size of the step": relative, "expected at most": max_relative},
            cause="wrong_direction",
            ruled_out=("a large learning rate (the size is relative to it)",),
        )
    return Verdict(name, Status.PASS)

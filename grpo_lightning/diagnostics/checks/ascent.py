"""The policy moves the way its gradient says.

For a small step ``s`` of the parameters the loss changes by the same amount, whichever way it is computed:

    sum_t gradient_t (c_t(theta + s) - c_t(theta)) = <gradient of the parameters, s>

The left side sees the forward pass alone, the right one the parameters alone. They agree if the logprobs depend on
these parameters as the gradient says, whatever the optimizer, the clipping and the learning rate are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.diagnostics.verdict import Status, Verdict

NAME = "ascent"

POWER = 10.0
"""Standard errors that the predicted change must have. Then half of it is 5 standard errors away from all of it."""

AGREES = (0.5, 2.0)
"""Measured over predicted change that second-order terms explain."""

FROZEN = 0.1
"""Share of the predicted change below which the policy does not follow its parameters."""

VISIBLE = 0.1
"""Standard errors of the predicted change from which on rounding alone would show some of it in some logprob."""

KEPT = 0.75
"""Share of the predicted change that must be left without dropout."""

STILL = 4.0
"""RMS of the logprobs' change, in standard deviations of the noise, below which they did not change."""


@dataclass(frozen=True)
class Movement:
    """What a step, or a part of it, did to the loss.

    Attributes:
        predicted: By the parameters' gradient.
        observed: By the logprobs.
        error: Standard error of ``observed`` from the noise of the forward pass.
    """

    predicted: float
    observed: float
    error: float

    @property
    def decides(self) -> bool:
        """Whether the prediction stands out from the noise."""
        return abs(self.predicted) > POWER * self.error

    @property
    def ratio(self) -> float:
        """Observed over predicted."""
        return self.observed / self.predicted

    @property
    def agrees(self) -> bool:
        """Whether both are about the same."""
        return self.decides and AGREES[0] <= self.ratio <= AGREES[1]


def movement(gradient: Tensor, change: Tensor, predicted: float, noise: float) -> Movement:
    """Hold the change of the logprobs against the prediction.

    Args:
        gradient: The loss's derivative by each logprob, float64 ``[N]``.
        change: Change of each logprob, float64 ``[N]``.
        predicted: The change that the parameters' gradient predicts.
        noise: Standard deviation of a logprob's noise, in nats.
    """
    return Movement(predicted, float(torch.dot(gradient, change)), noise * 2**0.5 * float(gradient.norm()))


@dataclass(frozen=True)
class Noise:
    """What moves logprobs without moving the policy.

    Attributes:
        train: RMS of the difference of two forwards of the training mode, in nats.
        rounding: What rounding explains.
        parameters: Whether parameters were changed outside the optimizer, or the ratios vary more than the sampler's
            and the trainer's rounding explain.
    """

    train: float
    rounding: float
    parameters: bool = False

    @property
    def random(self) -> bool:
        """Whether the training mode is random."""
        return self.train > 4 * self.rounding


def check_ascent(whole: Movement, small: Movement | None, noise: Noise, *, moved: float, still: bool) -> Verdict:
    """The logprobs follow the parameters, and in the direction of their gradient.

    Args:
        whole: Of the step.
        small: Of a small part of the step, where it follows the gradient better; None if not needed.
        noise: What moves logprobs otherwise.
        moved: RMS of the change of the logprobs, in nats, over its standard deviation from noise alone.
        still: Whether no logprob changed in any bit, in a forward pass that is not random, although enough could.
    """
    if still and abs(whole.predicted) > VISIBLE * whole.error:
        shown: dict[str, float | int | str]
        shown = {"change of the loss by the parameters": whole.predicted, "logprobs that changed": 0}
        return _failed(_frozen(noise), shown, _RULED_OUT_STILL)
    if not whole.decides:
        return Verdict(
            NAME,
            Status.NO_POWER,
            f"The step should change the loss by {whole.predicted:.2g}, which is below {POWER:g} times the noise "
            f"({whole.error:.2g}).",
        )
    judged = small if small is not None and small.decides else whole
    shown = {
        "change of the loss by the parameters": judged.predicted,
        "by the logprobs": judged.observed,
        "ratio": judged.ratio,
        "expected": f"{AGREES[0]:g} to {AGREES[1]:g}",
        "standard error": judged.error,
    }
    if whole.agrees or judged.agrees:
        return Verdict(NAME, Status.PASS, evidence=shown)
    shown |= {"train-mode noise": noise.train, "rounding noise": noise.rounding}
    if abs(whole.ratio) < FROZEN and moved < STILL:
        return _failed(_frozen(noise), shown, _RULED_OUT)
    # Where the gradient is that of one draw of dropout, the mean of all draws differs from it.
    if judged is whole or (noise.random and judged.ratio > -AGREES[0]):
        return Verdict(NAME, Status.NO_POWER, "The step is too large to be compared with its gradient.", evidence=shown)
    return _failed(_wrong(judged.ratio), shown, _RULED_OUT)


def _failed(reason: tuple[str, str, str], shown: dict[str, float | int | str], ruled_out: tuple[str, ...]) -> Verdict:
    cause, message, fix = reason
    return Verdict(NAME, Status.FAIL, message, fix, shown, cause=cause, ruled_out=ruled_out)


_RULED_OUT = ("a large learning rate, momentum or clipping (a part of the step was held against its own prediction)",)

_RULED_OUT_STILL = (
    "a small learning rate (rounding alone would change some logprobs)",
    "a solved task (the tokens are not certain)",
)


def _frozen(noise: Noise) -> tuple[str, str, str]:
    fix = (
        "The forward pass does not use the parameters that are trained: look for a copy of the model made before "
        "training, a merged or disabled adapter, and cached weights."
    )
    message = "The policy does not move: its parameters change, and its logprobs do not."
    if noise.random:
        return (
            "frozen_behind_dropout",
            f"{message} Dropout or other noise of the training mode makes the ratios vary all the same.",
            f"{fix} Set lora_dropout to 0: it hides this.",
        )
    if noise.parameters:
        return (
            "frozen_behind_noise",
            f"{message} Noise on the weights makes the ratios vary all the same.",
            f"{fix} Remove ParameterPerturbation and other noise on weights: it hides this.",
        )
    return "policy_frozen", message, fix


def _wrong(ratio: float) -> tuple[str, str, str]:
    fix = (
        "Look for what changes the parameters' gradients behind the loss (hooks, scaling, a sign), and for parts of "
        "the model that the backward pass sees otherwise than the forward pass."
    )
    if ratio < 0:
        return (
            "wrong_direction",
            "The policy moves against its loss: what should become likelier becomes less likely.",
            fix,
        )
    return (
        "wrong_gradient",
        f"The gradient of the parameters is not that of the loss: a step changes it by {ratio:.3g} times what the "
        "gradient says.",
        fix,
    )


def check_descends(cosine: float, *, first: bool, streak: int, allowed: int) -> Verdict:
    """The optimizer goes down the gradient.

    Args:
        cosine: Between the step and the gradient.
        first: Whether it is the optimizer's first step, so that no momentum explains its direction.
        streak: Steps in a row that went up, this one included.
        allowed: How many decide.
    """
    name = "descent"
    if not (first and cosine > FROZEN) and streak < allowed:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        "The optimizer goes up the gradient: the steps make the loss larger.",
        "Look at maximize=True, a negative learning rate, and what changes gradients between backward and step.",
        {"cosine of step and gradient": cosine, "expected": "below 0", "steps in a row": streak, "allowed": allowed},
        cause="wrong_direction",
        ruled_out=("momentum (first step)" if first else f"momentum (it fades within {allowed} steps)",),
    )


def check_train_noise(noise: Noise, whole: Movement, *, declared: bool) -> Verdict:
    """Two forwards with the same weights agree, or at least do not drown what an update changes.

    Dropout that somebody asked for is no news, unless it makes the gradient: a draw's gradient promises more than the
    mean of all draws keeps. With a dropout of 0.1 about 0.9 is kept, with 0.5 about 0.55.

    Args:
        noise: What was measured.
        whole: What the step did to the loss without dropout, and should have done.
        declared: Whether the user asked for dropout of the adapter.
    """
    name = "train-mode noise"
    kept = whole.ratio if whole.decides else 1.0
    shown: dict[str, float | int | str] = {
        "RMS between two forwards": noise.train,
        "rounding noise": noise.rounding,
        "allowed": 4 * noise.rounding,
        "kept of the predicted change": kept,
        "expected at least": KEPT,
    }
    if not noise.random or (declared and kept >= KEPT):
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        "Two forwards of the training mode with the same weights give different logprobs: the ratios hold noise.",
        "Set lora_dropout to 0 or near it."
        if declared
        else "Look for dropout in the model's configuration, and for modules that add noise.",
        shown,
        cause="noisy_forward",
        ruled_out=() if declared else ("lora_dropout (it is 0)",),
    )

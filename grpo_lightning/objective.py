"""The loss of a micro-batch: one function over the pieces that the settings name.

Shapes: ``N`` sampled tokens of a micro-batch.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.correction import CORRECTIONS, Correction
from grpo_lightning.functional.entropy import high_entropy_marks
from grpo_lightning.functional.kl import IN_LOSS, KL_ESTIMATORS
from grpo_lightning.functional.marks import Marks, covariance
from grpo_lightning.functional.ratio import RATIO_LEVELS
from grpo_lightning.functional.surrogates import MARKS, SURROGATES, TOKEN_RATIO_ONLY, clipped
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss
from grpo_lightning.named import configured, named, one_of

_DEFAULTS = {name: p.default for name, p in inspect.signature(clipped).parameters.items() if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class Objective:
    """What is minimised.

        loss = sum_t w_t (focus_t correction_t surrogate(ratio_t, A_t) + kl_coef kl_t - entropy_coef H_t)

    Attributes:
        surrogate: From `PolicyTerms` to the loss of each token, its settings bound.
        marks: Chooses tokens of an optimizer step for a surrogate that treats some apart; None for the others.
        proximal: Whether the ratio compares with what the trainer computed before the epoch, not with what the engine
            returned.
        correction: From the log-ratio of these two, weights and sequences to a `Correction`; None without one.
        focus_share: Share of the tokens, those of the highest entropy, that the surrogate is computed of; None for all.
        ratio_level: Name in `RATIO_LEVELS`.
        kl_estimator: Name in `KL_ESTIMATORS`.
        kl_coef: Weight of the KL to the reference in the loss.
        kl_reward: Its weight in the reward.
        entropy_coef: Weight of the policy's entropy, which is maximised.
    """

    surrogate: Callable[[PolicyTerms], TokenLoss]
    marks: Marks | None = None
    proximal: bool = False
    correction: Callable[[Tensor, Tensor, Tensor], Correction] | None = None
    focus_share: float | None = None
    ratio_level: str = "token"
    kl_estimator: str = "k3"
    kl_coef: float = 0.0
    kl_reward: float = 0.0
    entropy_coef: float = 0.0

    @classmethod
    def from_settings(
        cls,
        *,
        surrogate: str | Callable[..., TokenLoss],
        surrogate_args: Mapping[str, Any],
        clips: Mapping[str, float | None],
        old_logprobs: str = "engine",
        correction: str | Callable[..., Correction] | None = None,
        correction_args: Mapping[str, Any] | None = None,
        focus_share: float | None = None,
        ratio_level: str,
        kl_estimator: str,
        kl_in: str = "loss",
    ) -> Self:
        """From what `GRPOModule` is given.

        Args:
            surrogate: Name in `SURROGATES`, import path, or the function itself.
            surrogate_args: Its settings.
            clips: ``clip_low`` and ``clip_high``, None where the surrogate's own are meant.
            old_logprobs: ``"engine"``, or ``"trainer"`` for the proximal policy, which a correction implies.
            correction: Name in `CORRECTIONS`, import path, or the function itself; None for none.
            correction_args: Its settings.
            focus_share: Share of tokens to train on.
            ratio_level: Name in `RATIO_LEVELS`.
            kl_estimator: Name in `KL_ESTIMATORS`.
            kl_in: ``"loss"`` or ``"reward"``: where the KL will stand.

        Raises:
            ConfigurationError: If a name is unknown, or a setting is not one of the function or out of its range.
        """
        one_of("ratio_level", ratio_level, RATIO_LEVELS)
        one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
        if kl_in not in ("loss", "reward"):
            raise ConfigurationError(f"expected kl_in to be 'loss' or 'reward', but got {kl_in!r}")
        if kl_in == "loss" and kl_estimator not in IN_LOSS:
            raise ConfigurationError(
                f"expected kl_estimator to be one of {', '.join(IN_LOSS)} for a KL in the loss, but got "
                f"{kl_estimator!r}: the gradient of its mean is not that of a KL divergence; kl_in='reward' takes it"
            )
        if old_logprobs not in ("engine", "trainer"):
            raise ConfigurationError(f"expected old_logprobs to be 'engine' or 'trainer', but got {old_logprobs!r}")
        if focus_share is not None and not 0 < focus_share <= 1:
            raise ConfigurationError(f"expected 0 < focus_share <= 1, or none, but got {focus_share}")
        settings = {**{name: clip for name, clip in clips.items() if clip is not None}, **surrogate_args}
        function = named("surrogate", surrogate, SURROGATES)
        if function in TOKEN_RATIO_ONLY and ratio_level != "token":
            raise ConfigurationError(
                f"surrogate {surrogate!r} compares single tokens: expected ratio_level 'token', but got {ratio_level!r}"
            )
        marks, settings = marks_of(function, settings)
        corrected = None
        if correction is None and correction_args:
            raise ConfigurationError(
                f"expected a correction beside correction_args, but got {dict(correction_args)} alone"
            )
        if correction is not None:
            found = named("correction", correction, CORRECTIONS)
            token = _one_token()
            corrected = configured(
                "correction", found, correction_args or {}, token.log_ratio, token.weight, token.sequence
            )
        bound = configured("surrogate", function, settings, _one_token())
        require_token_loss(bound(_one_token()), 1)
        return cls(
            bound,
            marks,
            old_logprobs == "trainer" or corrected is not None,
            corrected,
            focus_share,
            ratio_level,
            kl_estimator,
        )

    @property
    def rescores(self) -> bool:
        """Whether the trainer computes each rollout once before it trains on it."""
        return self.proximal or self.focus_share is not None or self.kl_reward > 0

    @property
    def focus(self) -> Callable[[Tensor], Tensor] | None:
        """From the entropies of a step's tokens to those that the surrogate is computed of; None for all."""
        if self.focus_share is None:
            return None
        share = self.focus_share
        return lambda entropy: high_entropy_marks(entropy, torch.ones_like(entropy), share=share)

    def plain_clips(self) -> tuple[float, float] | None:
        """Both clips where this is GRPO's own loss: the clipped surrogate of each token, and k3; None elsewhere."""
        surrogate = self.surrogate
        if self.correction is not None or self.focus_share is not None or self.kl_estimator != "k3":
            return None
        if not isinstance(surrogate, partial) or surrogate.func is not clipped:
            return None
        settings = {**_DEFAULTS, **surrogate.keywords}
        plain = self.ratio_level == "token" and settings["dual_clip"] is None and settings["delta"] is None
        return (settings["clip_low"], settings["clip_high"]) if plain else None


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a micro-batch is computed from; each ``[N]``.

    Attributes:
        logprobs: Under the current policy, with gradient.
        old_logprobs: Of the policy that the ratio compares with, without gradient.
        advantages: Advantage.
        weight: Weight in the loss of the optimizer step; tokens of weight 0 have no say, whatever they hold.
        sequence: Sequence of each token, int64.
        marked: Tokens chosen for the whole optimizer step, bool.
        behaviour: Of the engine; None where no correction is asked for.
        focus: Tokens that the surrogate is computed of, bool; None for all.
        reference: Under the reference; None without a KL.
        entropy: Of the current policy; with gradient if it has a weight.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weight: Tensor
    sequence: Tensor
    marked: Tensor | None = None
    behaviour: Tensor | None = None
    focus: Tensor | None = None
    reference: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """What the loss was.

    Attributes:
        loss: Scalar to minimise.
        log_ratio: Log-ratio of each token to the old policy, before any clip and whatever the level, detached, ``[N]``.
        clipped_low: Where a bound for small ratios removes the gradient, bool, ``[N]``.
        clipped_high: Where a bound for large ratios removes the gradient, bool, ``[N]``.
        factor: What correction and focus multiply the surrogate of each token by, ``[N]``.
        dropped: Tokens that the correction dropped, bool, ``[N]``.
        capped: Tokens whose correction reached its cap, bool, ``[N]``.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    factor: Tensor
    dropped: Tensor
    capped: Tensor


def policy_loss(objective: Objective, inputs: LossInputs) -> PolicyLoss:
    """A micro-batch's share of the loss of its optimizer step.

    Raises:
        ValueError: If shapes differ, or ``old_logprobs`` carries a gradient: that of the ratio would then cancel and
            nothing would be learned.
    """
    shapes = {tuple(t.shape) for t in (inputs.logprobs, inputs.old_logprobs, inputs.advantages, inputs.weight)}
    if len(shapes) != 1:
        raise ValueError(f"expected tensors of one shape [N], but got shapes {sorted(shapes)}")
    if inputs.old_logprobs.requires_grad:
        raise ValueError("expected old logprobs without gradient, but they require grad: detach them")
    real = inputs.weight != 0
    terms = policy_terms(objective, inputs, real)
    token = objective.surrogate(terms)
    require_token_loss(token, len(terms.logprobs))
    correction = correction_of(objective, inputs, terms, real)
    factor = correction.weight if inputs.focus is None else correction.weight * inputs.focus[real]
    loss = factor * token.loss
    if objective.kl_coef:
        assert inputs.reference is not None, "a KL needs the reference's logprobs"
        loss = loss + objective.kl_coef * kl_of(objective.kl_estimator, terms.logprobs, inputs.reference[real])
    if objective.entropy_coef:
        assert inputs.entropy is not None, "an entropy bonus needs the entropy"
        loss = loss - objective.entropy_coef * inputs.entropy[real]
    nowhere = torch.zeros_like(real)
    return PolicyLoss(
        (terms.weight * loss).sum(),
        (inputs.logprobs - inputs.old_logprobs).detach(),
        nowhere.masked_scatter(real, token.clipped_low),
        nowhere.masked_scatter(real, token.clipped_high),
        torch.ones_like(inputs.weight).masked_scatter(real, factor),
        nowhere.masked_scatter(real, correction.dropped),
        nowhere.masked_scatter(real, correction.truncated),
    )


def require_token_loss(found: Any, tokens: int) -> None:
    """Refuse what a surrogate of a user's own gives back if it is not the loss of each token.

    Raises:
        ConfigurationError: If it is something else, or of another shape.
    """
    if not isinstance(found, TokenLoss):
        raise ConfigurationError(f"expected the surrogate to return a TokenLoss, but got {type(found).__name__}")
    shapes = [tuple(values.shape) for values in vars(found).values()]
    if any(shape != (tokens,) for shape in shapes):
        raise ConfigurationError(f"expected the surrogate to return tensors of shape ({tokens},), but got {shapes}")


def correction_of(objective: Objective, inputs: LossInputs, terms: PolicyTerms, real: Tensor) -> Correction:
    """What the difference of engine and trainer asks for, for the tokens that count.

    A log-probability that is not finite makes the factors NaN, and so the loss: the checks of the update name it.
    """
    nothing = torch.zeros_like(terms.marked)
    if objective.correction is None:
        return Correction(torch.ones_like(terms.weight), nothing, nothing)
    assert inputs.behaviour is not None, "a correction needs the engine's logprobs"
    apart = (inputs.old_logprobs - inputs.behaviour)[real]
    if not bool(apart.isfinite().all()):
        return Correction(apart * torch.nan, nothing, nothing)
    return objective.correction(apart, terms.weight, terms.sequence)


def policy_terms(objective: Objective, inputs: LossInputs, real: Tensor) -> PolicyTerms:
    """What the surrogate is given: the tokens that count.

    Args:
        objective: The loss.
        inputs: Its inputs.
        real: Tokens that count, bool ``[N]``.
    """
    logprobs, weight = inputs.logprobs[real], inputs.weight[real]
    sequence = torch.unique(inputs.sequence[real], return_inverse=True)[1]
    log_ratio = RATIO_LEVELS[objective.ratio_level](logprobs, inputs.old_logprobs[real], weight, sequence)
    marked = torch.zeros_like(sequence, dtype=torch.bool) if inputs.marked is None else inputs.marked[real]
    return PolicyTerms(logprobs, log_ratio, inputs.advantages[real], weight, sequence, marked)


def kl_of(estimator: str, logprobs: Tensor, reference: Tensor) -> Tensor:
    """The KL to the reference, token by token."""
    return KL_ESTIMATORS[estimator](logprobs, reference)


def marks_of(surrogate: Callable[..., TokenLoss], settings: Mapping[str, Any]) -> tuple[Marks | None, dict[str, Any]]:
    """What chooses a surrogate's marked tokens, and the settings that are left for the surrogate itself.

    Args:
        surrogate: The surrogate.
        settings: Those of both.
    """
    choose = MARKS.get(surrogate)
    if choose is None:
        return None, dict(settings)
    known = inspect.signature(choose).parameters
    own = {name: value for name, value in settings.items() if name in known and name != "keys_N"}
    bound = partial(choose, **own)
    keyed = "keys_N" in known

    def marks(old_logprobs: Tensor, advantages: Tensor, keys: Tensor) -> Tensor:
        random = {"keys_N": keys} if keyed else {}
        return bound(covariance(old_logprobs, advantages), **random)

    try:
        marks(*[torch.zeros(1, dtype=torch.float64)] * 3)
    except ValueError as error:
        raise ConfigurationError(f"surrogate_args cannot be {own}: {error}") from error
    return marks, {name: value for name, value in settings.items() if name not in own}


def _one_token() -> PolicyTerms:
    """A token on which settings are tried."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return PolicyTerms(zero - 1, zero, one, one, torch.zeros(1, dtype=torch.int64), zero.bool())

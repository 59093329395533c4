"""The sampler's logprobs are those of the distribution that the tokens were drawn from, as the trainer computes it."""

from collections.abc import Sequence

from torch import Tensor

from grpo_lightning.diagnostics.checks.common import uncertain_tokens
from grpo_lightning.diagnostics.hypotheses import Fit, Hypothesis, fit
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status, Verdict

CLEAR = 20.0
"""`Fit.likelihood` above which the hypothesis is e^20 times as likely as that all is well."""

CLEAR_FACTOR = 4.0
"""It then must also predict the logprobs four times as well: rounding errors follow no hypothesis."""

LEAST_PART = 0.1
"""A smaller part of a hypothesis's effect is no sign of it."""

MOSTLY = 0.7
"""Part of the differences, beyond noise, that a hypothesis must explain."""

CONSTANT = 1e-6
"""Spread in nats below which logprobs are all alike."""

_MESSAGES = {
    "raw_logprobs": "The engine returns raw logprobs, not those of the distribution that it samples from",
    "wrong_temperature": "The engine's logprobs fit another temperature than the trainer's",
    "truncated_sampling": "The engine cuts off unlikely tokens and renormalises; the trainer does not",
    "shifted_logprobs": "The sampler's logprobs belong to other tokens",
    "logprobs_constant": "The sampler's logprobs are all alike within a sequence",
    "logprob_units": "The sampler's logprobs are not natural logarithms",
    "adapter_ignored": "The engine samples from the base model although an adapter is trained",
    "adapter_partial": "The engine applies only a part of the adapter",
    "adapter_scale": "The engine applies the adapter with another scale",
    "sync_stale": "The engine samples with an older version than it reports",
}
_FIXES = {
    "raw_logprobs": "Ask the engine for processed logprobs (vLLM: logprobs_mode='processed_logprobs').",
    "wrong_temperature": "Set the temperature in one place, RolloutDataModule(temperature=...), and let nothing else "
    "in the engine or its generation_config.json change it.",
    "truncated_sampling": "Switch off top_p, top_k and min_p in the engine, also in its generation_config.json.",
    "shifted_logprobs": "Logprob t must be that of token t. Look for an off-by-one where prompt and completion are cut "
    "apart, or where a list of logprobs is flattened.",
    "logprobs_constant": "Store one logprob per token, not one per sequence.",
    "logprob_units": "Return natural logarithms.",
    "adapter_ignored": "Look at LoRAWeightSync and at what the engine loads: a path or adapter name that was used "
    "before, a request without the adapter.",
    "adapter_partial": "Look at what the engine says when it loads the adapter: modules that it does not support are "
    "left out silently. Train without them, or use another engine.",
    "adapter_scale": "lora_alpha and rank must reach the engine unchanged: compare adapter_config.json with the "
    "module's.",
    "sync_stale": "Publish before each rollout, under a name that was never used, and wait until it is loaded.",
}
_RULED_OUT = ("rounding, which no hypothesis fits better than another",)


def check_semantics(
    s: Tensor,
    o: Tensor,
    sequence: Tensor,
    hypotheses: Sequence[Hypothesis],
    thresholds: Thresholds,
    noise: float,
) -> Verdict:
    """No hypothesis explains the sampler's logprobs better than that they are what they should be.

    A hypothesis is found if ``alpha``, the part of its effect that is there, is about 1 and lies ``thresholds.z``
    standard errors above 0, which also shows effects far below the noise per token; or if it predicts the logprobs
    far better. In both cases it must explain most of what noise does not. Of those found, the closest is named.

    Args:
        s: The sampler's logprobs, float64 ``[N]``.
        o: The trainer's with the same weights, float64 ``[N]``.
        sequence: Sequence of each token, int64 ``[N]``.
        hypotheses: What else they may be.
        thresholds: The doctor's limits.
        noise: RMS of ``s - o`` in nats if all is well, roughly.
    """
    name = "logprob semantics"
    unsure = uncertain_tokens(o)
    if unsure < thresholds.tokens:
        return Verdict(name, Status.NO_POWER, f"Only {unsure} tokens were not certain; needs {thresholds.tokens}.")
    fits = [fitted for h in hypotheses if (fitted := fit(h, s, o, sequence)) is not None]
    found = [f for f in fits if _holds(f, s, o, thresholds, noise)]
    if not found:
        rms = float((s - o).square().mean().sqrt())
        return Verdict(name, Status.PASS, evidence={"mismatch RMS": rms, "hypotheses": len(fits), "tokens": len(o)})
    best = max(found, key=lambda f: (round(f.explained, 1), -f.mad))
    cause = _cause(best.hypothesis, o)
    evidence: dict[str, float | int | str] = {
        "what fits": best.hypothesis.name,
        "part of its effect that is there": best.alpha,
        "standard error": best.se,
        "standard errors above 0": best.z,
        "allowed": thresholds.z,
        "mean difference from it": best.mad,
        "mean difference from what it should be": best.mad_0,
        "tokens": best.tokens,
    }
    if best.temperature is not None:
        evidence["temperature that fits"] = round(best.temperature, 3)
    return Verdict(
        name,
        Status.FAIL,
        f"{_MESSAGES[cause]} ({best.hypothesis.name}).",
        _FIXES[cause],
        evidence,
        cause=cause,
        ruled_out=_RULED_OUT,
    )


def check_trainer_temperature(
    used: Tensor,
    o: Tensor,
    sequence: Tensor,
    hypotheses: Sequence[Hypothesis],
    thresholds: Thresholds,
    rounding: float,
) -> Verdict:
    """The logprobs that the loss uses are at the sampling temperature.

    Args:
        used: What the policy says of the tokens, as in the loss, float64 ``[N]``.
        o: The same from its distributions at temperature 1, scaled to the sampling temperature, float64 ``[N]``.
        sequence: Sequence of each token, int64 ``[N]``.
        hypotheses: Those that are temperatures are tried.
        thresholds: The doctor's limits.
        rounding: RMS difference in nats that is nothing unusual.
    """
    name = "trainer temperature"
    rms = float((used - o).square().mean().sqrt()) if len(o) else 0.0
    fits = [f for h in hypotheses if h.inverse_temperatures is not None if (f := fit(h, used, o, sequence)) is not None]
    best = max(fits, key=lambda f: (round(f.explained, 2), -f.mad), default=None)
    if best is None or uncertain_tokens(o) < thresholds.tokens:
        return Verdict(name, Status.NO_POWER, f"Needs {thresholds.tokens} tokens that were not certain.")
    if (
        rms <= rounding
        or best.explained <= MOSTLY
        or best.alpha <= 0
        or best.z <= thresholds.z
        or best.temperature is None
    ):
        return Verdict(name, Status.PASS, evidence={"RMS difference, nats": rms})
    assert best.hypothesis.inverse_temperatures is not None
    sampled_at = 1 / best.hypothesis.inverse_temperatures[0]
    return Verdict(
        name,
        Status.FAIL,
        f"The trainer computes its logprobs at a temperature of about {best.temperature:.2g}, but samples are drawn at "
        f"{sampled_at:.4g}.",
        "Divide the trainer's logits by RolloutDataModule(temperature=...) too, which each batch carries.",
        {
            "temperature that fits the trainer": round(best.temperature, 3),
            "sampling temperature": round(sampled_at, 6),
            "RMS difference, nats": rms,
            "allowed": rounding,
            "part that the temperature explains": best.explained,
        },
        cause="wrong_temperature",
        ruled_out=("the engine: the trainer is compared with its own distributions",),
    )


def _holds(found: Fit, s: Tensor, o: Tensor, thresholds: Thresholds, noise: float) -> bool:
    least, most = found.hypothesis.alphas
    total = float((s - o).square().mean())
    # Where the effect is below the noise, what it explains of the whole is small by nature.
    small = total < (CLEAR_FACTOR * noise) ** 2
    mostly = small or found.explained * total > MOSTLY * (total - noise**2)
    seen = least <= found.alpha <= most and abs(found.alpha) > LEAST_PART and found.z > thresholds.z
    clear = found.likelihood > CLEAR and found.mad_0 > CLEAR_FACTOR * found.mad
    return mostly and (seen or clear)


def _cause(hypothesis: Hypothesis, o: Tensor) -> str:
    """Raw logprobs belong to tokens that were drawn at the right temperature; these are likelier at theirs."""
    if hypothesis.cause == "raw_logprobs" and float((hypothesis.logprobs - o).sum()) > 0:
        return "wrong_temperature"
    return hypothesis.cause


def check_values(s: Tensor, o: Tensor, thresholds: Thresholds) -> Verdict:
    """The sampler's logprobs are there, and vary as the trainer's do.

    Args:
        s: The sampler's logprobs, float64 ``[N]``; NaN where there is none.
        o: The trainer's, float64 ``[N]``.
        thresholds: The doctor's limits.
    """
    name = "sampler logprobs"
    missing = int((~s.isfinite()).sum())
    if missing:
        return Verdict(
            name,
            Status.FAIL,
            f"The sampler returned no logprob, or NaN, for {missing} of {len(s)} sampled tokens.",
            "Ask the engine for the logprob of each sampled token, and let a missing one stop the run.",
            {"missing": missing, "tokens": len(s)},
            cause="logprobs_missing",
        )
    unsure = o < -0.01
    count = int(unsure.sum())
    if count < thresholds.tokens:
        return Verdict(name, Status.NO_POWER, f"Only {count} tokens were not certain; needs {thresholds.tokens}.")
    spread, expected = float(s[unsure].std()), float(o[unsure].std())
    if spread > CONSTANT or expected < 0.1:
        return Verdict(name, Status.PASS)
    zero = bool((s[unsure] == 0).all())
    return Verdict(
        name,
        Status.FAIL,
        "The sampler's logprobs are all 0: missing ones were filled in."
        if zero
        else f"The sampler's logprobs are all {float(s[unsure][0]):.4g}, whatever the token.",
        "Store what the engine returned for each token; a missing logprob must stop the run.",
        {"standard deviation": spread, "of the trainer's": expected, "allowed": CONSTANT, "tokens": count},
        cause="logprobs_zero" if zero else "logprobs_constant",
        ruled_out=("a policy that is certain of everything: it is not",),
    )

"""The tokens that are trained on are the ones that the engine sampled: exact comparisons.

Symbols: a *run* is what one turn's ledger calls sampled; the *record* is what the engine returned, noted there.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grpo_lightning.diagnostics.checks.common import CERTAIN, MIN_TOKENS
from grpo_lightning.diagnostics.rollout_table import SampledRun
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.generation_record import GenerationRecord, Noted, digest

CONSTANT_STD = 1e-6
"""Logprobs of many tokens that spread less than this, in nats, are one number and its rounding."""

TOKEN_FIXES = {
    "retokenised": "Train on the ids that the engine returned. Do not decode a completion and encode its text again: "
    "text does not lead back to the same tokens.",
    "context_changed": "Put a completion behind the very ids that the engine was asked to continue.",
    "forced_in_mask": "Give what the system says in the policy's place the source FORCED, without logprobs.",
    "environment_in_mask": "Give observations, tool results and the template's text the source ENVIRONMENT.",
    "foreign_tokens": "Train on nothing that the engine did not return for this rollout.",
    "samples_repeated": "Give each episode its own request with its own seed, and its own data.",
    "stale_rollout": "Keep the policy version that the engine reported with each completion.",
}
LOGPROB_FIX = "Store the logprobs that the engine returned with the tokens, one for one, and pass them on as they are."

STATEMENTS = {
    "retokenised": "have other tokens than the engine returned for them",
    "context_changed": "stand behind other tokens than the engine was asked to continue",
    "forced_in_mask": "hold tokens that the policy did not choose: the system said them in its place",
    "environment_in_mask": "hold tokens of the prompt or of the environment",
    "foreign_tokens": "hold tokens that the engine never returned",
    "samples_repeated": "are further copies of a completion that the engine returned less often",
    "stale_rollout": "name another policy version than the engine did",
    "logprobs_missing": "have no logprobs, although the engine returned some",
    "logprobs_zero": "have logprobs 0 that the engine did not return",
    "logprobs_constant": "have one and the same logprob everywhere, which the engine did not return",
    "shifted_logprobs": "have the engine's logprobs shifted by one token",
    "logprobs_replaced": "have other logprobs than the engine returned",
}


def check_sources(runs: Sequence[SampledRun]) -> Verdict:
    """What the ledgers call sampled is what the episodes' actions say the policy chose."""
    faults = [(cause, run) for run in runs if (cause := source_fault(run))]
    return _answer("token sources", faults, len(runs))


def source_fault(run: SampledRun) -> str:
    """Which cause fits a run that is not its episode's action; empty if it is."""
    action = run.action
    if action is None:
        return "environment_in_mask"
    trained, said = run.token_ids.tolist(), list(action.token_ids)
    if action.was_forced:
        return "forced_in_mask" if trained[len(trained) - len(said) :] == said else "environment_in_mask"
    if trained == said:
        return ""
    # What is forced closes a turn, what the environment says comes before it.
    if trained[len(trained) - len(said) :] == said:
        return "environment_in_mask"
    return "forced_in_mask" if trained[: len(said)] == said else "retokenised"


def check_sampled_tokens(runs: Sequence[SampledRun], record: GenerationRecord | None) -> Verdict:
    """Each trained turn is a completion that the engine returned: tokens, logprobs, context and version."""
    name = "sampled tokens"
    if record is None:
        return Verdict(
            name, Status.NO_POWER, "This rollout was restored from a checkpoint: what the engine returned is not known."
        )
    # What is not even the episode's action is the business of `check_sources`.
    found = [(run, _noted(run), record.returned(run.token_ids)) for run in runs if not source_fault(run)]
    known_episodes = {run.key for run, _, returned in found if returned}
    used: Counter[tuple[bytes, Noted]] = Counter()
    faults: list[tuple[str, SampledRun]] = []
    for run, seen, returned in found:
        if not returned:
            asked = record.was_asked(seen.prompt)
            cause = "retokenised" if asked else "forced_in_mask" if run.key in known_episodes else "foreign_tokens"
            faults.append((cause, run))
            continue
        key = digest(run.token_ids, np.int64), seen
        used[key] += 1
        if returned[seen] < used[key]:
            faults.append((_run_fault(run, seen, returned), run))
    return _answer(name, faults, len(runs))


def _noted(run: SampledRun) -> Noted:
    ledger = run.ledger
    return Noted.of(ledger.token_ids[: run.start], run.logprobs, int(ledger.policy_version[run.start]))


def _run_fault(run: SampledRun, seen: Noted, returned: Counter[Noted]) -> str:
    """What differs from all that the engine returned with these tokens."""
    if seen in returned:
        return "samples_repeated"
    same_logprobs = [noted for noted in returned if noted.logprobs == seen.logprobs]
    if not same_logprobs:
        shifted = {digest(np.roll(run.logprobs, lag), np.float64) for lag in (-1, 1)}
        if any(noted.logprobs in shifted for noted in returned):
            return "shifted_logprobs"
        return replaced_logprobs(run.logprobs) or "logprobs_replaced"
    if all(noted.prompt != seen.prompt for noted in same_logprobs):
        return "context_changed"
    return "stale_rollout"


def replaced_logprobs(values: NDArray[np.float64]) -> str:
    """Which cause fits logprobs that are not the engine's; empty if they look like any.

    Args:
        values: The logprobs that took their place.
    """
    if np.isnan(values).any():
        return "logprobs_missing"
    if (values == 0).all():
        return "logprobs_zero"
    return "logprobs_constant" if len(values) >= MIN_TOKENS and values.std() < CONSTANT_STD else ""


def name_copies(verdict: Verdict, stored: Tensor, computed: Tensor) -> Verdict:
    """Say so if the logprobs that are not the engine's are the trainer's own, bit for bit.

    Args:
        verdict: What `check_sampled_tokens` said.
        stored: Logprobs of the rollout's tokens as they are stored, float64 ``[N]``.
        computed: What the trainer says of them with the weights that sampled them, float64 ``[N]``.
    """
    unsure = computed < CERTAIN
    if int(unsure.sum()) < MIN_TOKENS or not torch.equal(stored[unsure], computed[unsure]):
        return verdict
    return replace(
        verdict,
        message=f"{verdict.message} All are the trainer's own, bit for bit.",
        evidence={**verdict.evidence, "equal to the trainer's": int(unsure.sum())},
        cause="logprobs_copied",
    )


def check_logprob_values(values: NDArray[np.float64]) -> Verdict:
    """Whatever the engine says it returned: logprobs of sampled tokens are numbers, and not one number.

    Args:
        values: The stored logprobs of all tokens that count as sampled.
    """
    name = "rollout logprobs"
    missing = int((~np.isfinite(values)).sum())
    evidence: dict[str, float | int | str] = {"tokens": len(values), "missing": missing}
    if missing:
        return Verdict(
            name,
            Status.FAIL,
            f"{missing} of {len(values)} sampled tokens have no logprob, or one that is not a number.",
            "Ask the engine for the logprob of each sampled token (vLLM: SamplingParams(logprobs=0)).",
            evidence,
            cause="logprobs_missing",
        )
    if len(values) < MIN_TOKENS:
        return Verdict(name, Status.NO_POWER, f"Only {len(values)} sampled tokens; needs {MIN_TOKENS}.", "", evidence)
    evidence |= {"standard deviation": float(values.std()), "allowed": CONSTANT_STD}
    if values.std() > CONSTANT_STD:
        return Verdict(name, Status.PASS, evidence=evidence)
    if values.mean() > CERTAIN:
        message = "All logprobs are about 0: a policy that is certain of each token, or zeros in their place."
        return Verdict(name, Status.NO_POWER, f"{message} The trainer's own logprobs decide.", "", evidence)
    return Verdict(
        name,
        Status.FAIL,
        f"All {len(values)} stored logprobs are {values.mean():.4g}, which no sampler returns.",
        "Look for a default in the place where the engine's logprobs are read.",
        evidence,
        cause="logprobs_constant",
        ruled_out=("a policy that is certain of each token (its logprobs would be about 0)",),
    )


def _answer(name: str, faults: Sequence[tuple[str, SampledRun]], turns: int) -> Verdict:
    """One verdict of all faults: the first of an episode explains its later ones, and the most frequent is named."""
    if not faults:
        return Verdict(name, Status.PASS, evidence={"turns": turns})
    first: dict[tuple[int, int], tuple[str, SampledRun]] = {}
    for cause, run in faults:
        first.setdefault(run.key, (cause, run))
    counts = Counter(cause for cause, _ in first.values())
    cause = counts.most_common(1)[0][0]
    example = next(run for found, run in first.values() if found == cause)
    shown = f"{example.token_ids[:8].tolist()}, logprobs {np.round(example.logprobs[:8], 4).tolist()}"
    return Verdict(
        name,
        Status.FAIL,
        f"{counts[cause]} episodes have turns that {STATEMENTS[cause]}.",
        TOKEN_FIXES.get(cause, LOGPROB_FIX),
        {
            "trained turns": turns,
            "wrong": len(faults),
            "allowed": 0,
            "for example": str(example),
            "its tokens": shown,
            **{f"episodes that begin with {other}": n for other, n in counts.items() if len(counts) > 1},
        },
        cause=cause,
    )

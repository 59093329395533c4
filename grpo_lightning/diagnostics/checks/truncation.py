"""Where sampling is truncated on purpose, verdicts about truncation speak of what was declared."""

from dataclasses import replace

from grpo_lightning.diagnostics.verdict import Verdict


def as_declared(verdict: Verdict, top_p: float, top_k: int) -> Verdict:
    """A verdict about tokens that were sampled with a declared truncation.

    Args:
        verdict: What a check says after that truncation was reckoned with.
        top_p: The declared mass.
        top_k: The declared number; 0 for none.
    """
    declared = f"top_p = {top_p:g}, top_k = {top_k}"
    verdict = replace(verdict, evidence={**verdict.evidence, "declared": declared})
    if verdict.cause != "truncated_sampling":
        return verdict
    fits = verdict.evidence.get("what fits")
    return replace(
        verdict,
        message=f"The engine does not truncate as it is asked to ({declared})" + (f", but: {fits}." if fits else "."),
        fix="An engine must draw with SamplingSettings.top_p and top_k, top-k first, apply nothing else, and return "
        "the logprobs of the distribution that is left.",
    )

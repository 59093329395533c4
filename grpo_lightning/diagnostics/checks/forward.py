"""The policy's packed forward pass says what its model says of the same tokens, one sequence after the other."""

from torch import Tensor

from grpo_lightning.diagnostics.verdict import Status, Verdict


def check_forward(packed: Tensor, plain: Tensor, allowed: float) -> Verdict:
    """Both of the trainer's own ways to the same logprobs agree; the engine has no part in it.

    Args:
        packed: What the loss will see, float64 ``[N]``.
        plain: What the Hugging Face model says of each sequence alone, float64 ``[N]``.
        allowed: RMS difference in nats that rounding explains in their dtype.
    """
    name = "forward pass"
    if not len(packed):
        return Verdict(name, Status.NO_POWER, "The engine sampled no tokens to compare.")
    difference = packed - plain
    rms = float(difference.square().mean().sqrt())
    shown: dict[str, float | int | str] = {
        "RMS difference (nats)": rms,
        "allowed": allowed,
        "largest": float(difference.abs().max()),
        "tokens": len(packed),
    }
    if rms <= allowed:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        "The trainer's own logprobs are not those of its model: its packed forward pass and the plain one disagree.",
        "Look at what the policy's forward pass is given: positions of completions behind a shared prompt, the "
        "attention mask or plan, the index of the state that predicts a token, and changed inputs.",
        shown,
        cause="wrong_forward",
        ruled_out=("the engine: both sides of this comparison are the trainer's, with the same weights",),
    )

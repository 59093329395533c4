"""The doctor's free checks of every update, alone."""

from typing import Literal

from grpo_lightning.callbacks.run_doctor import RunDoctor
from grpo_lightning.diagnostics.checks import MAX_MISMATCH
from grpo_lightning.diagnostics.examination import Examination
from grpo_lightning.diagnostics.examinations.ratio import MIN_STD


class RatioDegeneracyDetector(RunDoctor):
    """Halts training, before the update is applied, when the update cannot mean anything.

    It is `RunDoctor` with nothing but the checks of the update itself: no pre-flight, no canary, no report. For every
    optimizer step it looks at the very log-ratios that the loss used, before clipping, and knows how many
    updates lie between sampling and now. A healthy first step after sampling (ratio 1, std 1e-5 in float32) passes;
    a policy that is stuck does not. Checks run in causal order and the first failure names the cause:

    1. logprobs and gradient are finite; 2. the old logprobs are the stored ones; 3. the sampler's logprobs are
    not zero-filled or copied; 4. they are aligned with their tokens; 5. the engine serves this adapter; 6. it agrees
    with the trainer as on the first rollout; 7. the ratios vary where they should; 8. the optimizer moves the
    parameters.

    Args:
        min_std: Spread of the ratio below which it is degenerate.
        strict: Halt on ``std < min_std`` whatever the number of updates since sampling. This also halts a healthy
            first update on a float32 engine: use it only with several updates per rollout or a noisy engine.
        action: ``"halt"`` raises, ``"warn"`` warns and goes on.
        warn_std: Optionally warn when the ratio's std is below this level after at least one update since sampling.
            No fixed level is right for all runs (0.006 is a healthy value), hence off by default.
        max_mismatch: Largest RMS difference in nats between the trainer's and the engine's logprobs right after
            sampling, when both hold the same weights.
        bitwise_consistent_engine: Declare that the engine's logprobs equal the trainer's bit for bit by design.
    """

    def __init__(
        self,
        *,
        min_std: float = MIN_STD,
        strict: bool = False,
        action: Literal["halt", "warn"] = "halt",
        warn_std: float | None = None,
        max_mismatch: float = MAX_MISMATCH,
        bitwise_consistent_engine: bool = False,
    ) -> None:
        super().__init__(
            min_std=min_std,
            strict=strict,
            warn_std=warn_std,
            max_mismatch=max_mismatch,
            bitwise_consistent_engine=bitwise_consistent_engine,
            reactions={"all": action},
            report=False,
            canary_tokens=0,
        )

    def _further_parts(self) -> tuple[Examination, ...]:
        """None: the update alone."""
        return ()

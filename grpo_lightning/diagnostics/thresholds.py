"""What the doctor's checks hold their measurements against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Limits of the doctor's checks. The defaults were derived as stated and calibrated on runs of the demo model.

    Args:
        z: Standard errors beyond which a deviation is no accident. 5.3 means p = 1.2e-7, so that 20 checks in each
            of 10,000 updates raise about 0.02 false alarms.
        tokens: Fewer tokens than this decide nothing.
        gradient_error: Largest relative error of the gradient at the logprobs against the closed form. It is float32
            whatever the model's precision, so that rounding stays below 1e-5.
        lr_zero_updates: Updates in a row without a learning rate that no warm-up and no decay explains. Both have one.
        min_step: Smallest step, of Adam's kind in learning rates per element, of others in learning rate times
            gradient. Healthy ones are 0.05 to 10.
        uphill_updates: Steps in a row up the gradient that no momentum explains. One of 0.9 has forgotten all but 7% of
            what is 25 steps old.
        entropy_share: Share of the first update's entropy below which the policy hardly explores.
        far_updates: Updates in a row with most tokens clipped, or a KL to the sampling policy above 1 nat, after
            which the policy has left the trust region.
        surprise: Nats by which chance must be unlikely to repeat samples or tasks: 16.1 means p = 1e-7 a rollout.
        marker_signal: A marker decides only if its effect is this many times the noise between trainer and engine.
        marker_tolerance: A marker's slope may differ from 1 by this much, beyond ``z`` standard errors: what a large
            random adapter does in bfloat16 is not the same in two implementations.
        float32_mismatch: Largest RMS difference in nats between the base models of trainer and engine where both
            compute in float32: room for the matrix units of GPUs, which multiply with 10 bits; 1e-5 on CPUs.
        half_noise: Least noise in nats to reckon with where one of them computes in half precision: two programs may
            agree bit for bit without an adapter and not with one. A fifth of what bfloat16 shows on the demo model.
        canary_tolerance: How far the engine may be from having followed the policy's change entirely (1) or, seen from
            the other end, not at all (0), where the measurement is exact enough.
        rounding_cosine: Least cosine between the policy's change and what of it is left in the engine's precision.
        cache_signal: A cached prefix differs if it does so by this many times what caching does with one adapter.
    """

    z: float = 5.3
    tokens: int = 32
    gradient_error: float = 1e-3
    lr_zero_updates: int = 3
    min_step: float = 1e-3
    uphill_updates: int = 25
    entropy_share: float = 0.01
    far_updates: int = 3
    surprise: float = 16.1
    marker_signal: float = 6.0
    marker_tolerance: float = 0.1
    float32_mismatch: float = 0.05
    half_noise: float = 0.01
    canary_tolerance: float = 0.25
    rounding_cosine: float = 0.9
    cache_signal: float = 6.0

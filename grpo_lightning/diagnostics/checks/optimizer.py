"""The optimizer holds what is trained, with a learning rate, and takes the steps that are planned."""

from collections.abc import Collection, Mapping, Sequence

from grpo_lightning.diagnostics.verdict import Status, Verdict

_SHOWN = 3


def check_trained(
    trainable: Mapping[str, int], expected: Collection[str], held: Collection[int], base: Mapping[str, int]
) -> Verdict:
    """What should be trained is trainable, and the optimizer holds it and nothing else of the model.

    Args:
        trainable: Id of every trainable parameter, by name.
        expected: Names of those that should be: of an adapter all, and whatever was trainable when training began.
        held: Ids of the parameters that the optimizer holds.
        base: Id of every parameter that must not be trained, by name.
    """
    name = "trained parameters"
    frozen = sorted(set(expected) - set(trainable))
    shown: dict[str, float | int | str] = {"trainable": len(trainable), "in the optimizer": len(held)}
    if frozen or not trainable:
        what = f"{len(frozen)} parameters that should be trained are frozen: {_some(frozen)}"
        return Verdict(
            name,
            Status.FAIL,
            f"{what}." if frozen else "No parameter is trainable.",
            "Look for requires_grad_(False), for an adapter loaded with is_trainable=False, and for a callback that "
            "freezes. If they are frozen on purpose, set reactions={'trained parameters': 'log'}.",
            shown | {"should be trainable": len(set(expected) | set(trainable))},
            cause="frozen_parameters",
            ruled_out=("the frozen base model (only what should be trained is counted)",),
        )
    missing = sorted(key for key, number in trainable.items() if number not in held)
    if missing:
        return Verdict(
            name,
            Status.FAIL,
            f"The optimizer does not hold {len(missing)} of {len(trainable)} trainable parameters: {_some(missing)}.",
            "Look at configure_optimizers: it must get policy.trainable_parameters() as they are when training "
            "begins. Parameters that are replaced afterwards are other parameters.",
            shown,
            cause="not_in_optimizer",
        )
    foreign = sorted(key for key, number in base.items() if number in held)
    if foreign:
        return Verdict(
            name,
            Status.FAIL,
            f"The optimizer also holds {len(foreign)} parameters of the base model: {_some(foreign)}.",
            "Give the optimizer policy.trainable_parameters() alone. The engine never gets what is trained beside the "
            "adapter, and neither do checkpoints.",
            shown | {"of the base model": len(foreign), "allowed": 0},
            cause="base_changed",
            ruled_out=("full fine-tuning (there is an adapter)",),
        )
    return Verdict(name, Status.PASS)


def check_learning_rate(rates: Sequence[float], peaks: Sequence[float], *, streak: int, allowed: int) -> Verdict:
    """The learning rate is not 0, or will rise.

    Args:
        rates: Learning rate of every parameter group in this step.
        peaks: What a scheduler scales, by group; without a scheduler the same as ``rates``.
        streak: Updates in a row with a rate of 0, this one included.
        allowed: How many a schedule may begin or end with.
    """
    name = "learning rate"
    if any(rate != 0 for rate in rates):
        return Verdict(name, Status.PASS)
    never = all(peak == 0 for peak in peaks)
    if not never and streak < allowed:
        return Verdict(name, Status.NO_POWER, f"The learning rate is 0, but not yet for {allowed} updates in a row.")
    return Verdict(
        name,
        Status.FAIL,
        "The learning rate is 0, and nothing will raise it."
        if never
        else f"The learning rate has been 0 for {streak} updates in a row.",
        "Set learning_rate, and look at lr_schedule, warmup_updates and the planned end of the run.",
        {"learning rate": 0.0, "peak": max(peaks, default=0.0), "updates in a row": streak, "allowed": allowed - 1},
        cause="lr_zero",
        ruled_out=(f"warm-up from 0 and decay to 0 (they take fewer than {allowed} updates at 0)",),
    )


def check_steps(begun: int, taken: int) -> Verdict:
    """Every update that was computed ended in an optimizer step.

    Args:
        begun: Updates whose micro-batches were computed.
        taken: Steps that the optimizer was asked for.
    """
    name = "optimizer steps"
    if begun <= taken:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        f"{begun - taken} of {begun} updates were computed, but no optimizer step was taken.",
        "Look at overrides of optimizer_step: they must call super().optimizer_step, or optimizer.step with the "
        "closure.",
        {"updates computed": begun, "steps taken": taken},
        cause="skipped_steps",
        ruled_out=("gradient accumulation (whole updates are counted)",),
    )


def check_processes(digests: Sequence[Mapping[str, tuple[float, ...]]]) -> Verdict:
    """All processes hold the same trained parameters.

    Args:
        digests: Of every process, sums over each parameter, by name.
    """
    name = "processes"
    if len(digests) < 2:
        return Verdict(name, Status.NO_POWER, "There is one process.")
    differing = sorted(
        {key for other in digests[1:] for key in {*digests[0], *other} if other.get(key) != digests[0].get(key)}
    )
    if not differing:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        f"The processes train different weights: {len(differing)} parameters differ, the first is {differing[0]}.",
        "Look for gradients that are not averaged (no_sync, a forward outside the strategy's model), for "
        "process-dependent noise, and for weights that only one process loads.",
        {"processes": len(digests), "parameters that differ": len(differing)},
        cause="processes_diverged",
    )


def check_collapse(
    entropy: float, first_entropy: float, *, min_share: float, far: int, far_allowed: int, clipped: float, kl: float
) -> Verdict:
    """The policy still chooses, and stays near the one that sampled.

    Args:
        entropy: Mean entropy of the update's tokens, in nats.
        first_entropy: The same in the run's first update.
        min_share: Smallest share of it that is left.
        far: Updates in a row far outside the trust region, this one included.
        far_allowed: How many decide.
        clipped: Share of the update's tokens that were clipped.
        kl: Mean k3 between the policy that sampled and this one, in nats.
    """
    name = "policy"
    shown: dict[str, float | int | str] = {
        "entropy": entropy,
        "entropy at first": first_entropy,
        "share of tokens clipped": clipped,
        "KL to the sampling policy": kl,
        "updates in a row far away": far,
    }
    if entropy < min_share * first_entropy:
        message = f"The policy's entropy fell below {min_share:.0%} of what it was: it hardly explores any more."
    elif far >= far_allowed:
        message = f"The policy is far from the one that sampled, {far} updates in a row."
    else:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        message,
        "Lower the learning rate or the updates per rollout, raise kl_coef, or stop: a solved task looks like this.",
        shown,
        cause="policy_collapsed",
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

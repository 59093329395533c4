"""Whether trainer and engine take turns on a GPU."""

from grpo_lightning.rollout.engine import RolloutEngine, SleepingEngine


def rests(engine: RolloutEngine) -> bool:
    """Whether an engine sleeps while the trainer trains, so that it can sample nothing then.

    Args:
        engine: Any engine.
    """
    return isinstance(engine, SleepingEngine) and engine.sleeps


def rest(engine: RolloutEngine) -> None:
    """Have an engine sleep, if it does that at all.

    Args:
        engine: An engine of which nothing is being asked.
    """
    if isinstance(engine, SleepingEngine) and engine.sleeps:
        engine.sleep()

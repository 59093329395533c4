"""No rollout from another policy than the trainer's."""

import time
from typing import TYPE_CHECKING

from grpo_lightning.errors import StaleRolloutError
from grpo_lightning.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from grpo_lightning.callbacks import LoRAWeightSync
    from grpo_lightning.module import GRPOModule


def sync_engine(engine: RolloutEngine, module: "GRPOModule", sync: "LoRAWeightSync | None") -> float:
    """Make the engine serve the module's current policy. Idempotent.

    Args:
        engine: A started engine.
        module: The module with the policy.
        sync: What publishes it.

    Returns:
        Seconds that publishing took.

    Raises:
        StaleRolloutError: If the engine is still behind afterwards.
    """
    engine.wait_until_ready()
    begin = time.perf_counter()
    if engine.policy_version != module.policy_version and sync is not None:
        sync.publish(module, engine)
    if engine.policy_version != module.policy_version:
        raise StaleRolloutError(
            f"the engine serves policy version {engine.policy_version}, but the trainer is at version "
            f"{module.policy_version}: training on its samples would be off-policy without a sign. "
            + (
                "The Trainer has no LoRAWeightSync callback; add one."
                if sync is None
                else f"{type(sync).__name__}.publish did not load the adapter into the engine."
            )
        )
    return time.perf_counter() - begin

"""No rollout from another policy than the trainer's."""

from typing import TYPE_CHECKING

from grpo_lightning.errors import StaleRolloutError
from grpo_lightning.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from grpo_lightning.callbacks import LoRAWeightSync
    from grpo_lightning.module import GRPOModule


def sync_engine(engine: RolloutEngine, module: "GRPOModule", sync: "LoRAWeightSync | None") -> None:
    """Make the engine serve the module's current policy, or one no older than was declared. Idempotent.

    Args:
        engine: An engine that is ready.
        module: The module with the policy.
        sync: What publishes it.

    Raises:
        StaleRolloutError: If the engine is still too far behind afterwards.
    """
    max_lag = 0 if sync is None else sync.max_lag

    def is_fresh() -> bool:
        served = engine.policy_version
        return served >= 0 and 0 <= module.policy_version - served <= max_lag

    if not is_fresh() and sync is not None:
        sync.publish(module, engine)
    if not is_fresh():
        raise StaleRolloutError(
            f"the engine serves policy version {engine.policy_version}, but the trainer is at version "
            f"{module.policy_version}"
            + (f" and may be ahead by {max_lag}" if max_lag else "")
            + ": training on its samples would be off-policy without a sign. "
            + (
                "The Trainer has no LoRAWeightSync callback; add one."
                if sync is None
                else f"{type(sync).__name__}.publish did not load the adapter into the engine."
            )
        )

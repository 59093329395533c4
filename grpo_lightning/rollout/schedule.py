"""Which rollout an epoch trains on, and where the order of tasks stands, also across a resume."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.distributed import processes
from grpo_lightning.errors import CheckpointError
from grpo_lightning.rng import rng_state, set_rng_state
from grpo_lightning.rollout.rollout import Rollout
from grpo_lightning.rollout.state import NOT_BEGUN, rollout_to_state


class RolloutSchedule:
    """Position in a run's rollouts.

    It counts for itself: Lightning's epoch is one behind when it first builds the loader of a resumed run.

    Attributes:
        rollouts: Rollouts made.
        tasks_drawn: Tasks drawn for them.
        current: The rollout that is trained on.
    """

    def __init__(self) -> None:
        self.rollouts = 0
        self.tasks_drawn = 0
        self.current: Rollout | None = None
        self._restored: dict[str, Any] | None = None

    def begin_run(self, fresh: bool) -> None:
        """Forget what an earlier run sampled, perhaps with another module; if this one is fresh, also the counts."""
        self.current, self._restored = None, None
        if fresh:
            self.rollouts = self.tasks_drawn = 0

    def add(self, rollout: Rollout) -> None:
        """A rollout was made."""
        self.current = rollout
        self.rollouts += 1
        origin = rollout.origin
        self.tasks_drawn += len(origin.tasks) if origin.drawn is None else origin.drawn

    def state_dict(self, fit_loop: Any) -> dict[str, Any]:
        """Counts, random generators of all processes, and the rollout if it is still needed.

        All processes must call it.

        Args:
            fit_loop: Lightning's, whose counts say, in whatever hook this runs, whether an epoch has begun or ended.
        """
        state: dict[str, Any] = {
            "rollouts": self.rollouts,
            "tasks_drawn": self.tasks_drawn,
            "rng": processes().gather(rng_state()),
            "rollout": None,
        }
        progress = fit_loop.epoch_progress.current
        if self.current is not None and self.current.origin.epoch == progress.processed:
            begun = progress.started > progress.processed
            batches = fit_loop.epoch_loop.batch_progress
            position = batches.current.processed if begun else NOT_BEGUN
            if begun and batches.is_last_batch:
                # Also where an epoch was ended early: what is left of it is not trained on.
                position = len(self.current.batches)
            elif begun:
                # Back to the last optimizer step, as `drop_partial_update` does.
                position -= position % self.current.layout.micro_batches
            state["rollout"] = rollout_to_state(self.current, position)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts; the rest waits for `take_restored`."""
        self.rollouts, self.tasks_drawn = state["rollouts"], state["tasks_drawn"]
        self._restored = state

    @property
    def restoring(self) -> bool:
        """Whether a loaded state waits for `take_restored`."""
        return self._restored is not None

    def take_restored(self, epoch: int) -> dict[str, Any] | None:
        """Restore the random generators, once, and give the state of the epoch's unfinished rollout, if there is one.

        Args:
            epoch: Epoch that is about to be trained.

        Raises:
            CheckpointError: If the rollout belongs to another epoch.
        """
        state, self._restored = self._restored, None
        if state is None:
            return None
        if len(state["rng"]) == processes().count:
            set_rng_state(state["rng"][processes().rank])
        else:
            rank_zero_warn(
                f"The checkpoint holds random generators of {len(state['rng'])} processes, but there are now "
                f"{processes().count}: they start anew. The order of tasks and the samples' seeds do not need them."
            )
        rollout: dict[str, Any] | None = state["rollout"]
        if rollout is not None and rollout["epoch"] != epoch:
            raise CheckpointError(
                f"the checkpoint holds an unfinished rollout of epoch {rollout['epoch']}, but the Trainer is about to "
                f"train epoch {epoch}: were Lightning's loops restored from the same checkpoint?"
            )
        return rollout

"""What a fault of the zoo is, and the stage that it is put on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import Callback

from grpo_lightning.diagnostics.causes import BY_NAME, Reaction
from grpo_lightning.rollout.engine import RolloutEngine


@dataclass(frozen=True)
class Deadline:
    """When a verdict must be there at the latest.

    A finding in time is one by `count` updates, rollouts or completions at the latest.

    Attributes:
        text: For people.
        unit: ``"updates"``: optimizer steps that may have been applied. ``"rollouts"``: rollouts that may have been
            trained on. ``"samples"``: completions that may have been trained on.
        count: How many.
        before_sampling: By then also the next rollout must not have been sampled.
    """

    text: str
    unit: str
    count: int
    before_sampling: bool = False

    def updates(self, per_rollout: int, samples_per_rollout: int) -> int:
        """Optimizer steps that may have been applied.

        Args:
            per_rollout: Optimizer steps of a rollout.
            samples_per_rollout: Its completions.
        """
        if self.unit == "updates":
            return self.count
        rollouts = self.count if self.unit == "rollouts" else -(-self.count // samples_per_rollout)
        return rollouts * per_rollout

    def met(self, moment: str, applied: int, limit: int) -> bool:
        """Whether a finding is in time.

        Args:
            moment: When it was made, as in `witness.Finding`.
            applied: Optimizer steps by then.
            limit: What `updates` says.
        """
        # After the last step of a rollout comes the publication, then sampling.
        return applied < limit or (applied == limit and (not self.before_sampling or moment in ("step", "sync")))


PRE_FLIGHT = Deadline("pre-flight", "updates", 0)
"""Before the first update is applied."""

FIRST_SYNC = Deadline("first sync", "rollouts", 1, before_sampling=True)
"""When a trained policy is published for the first time, before anything is sampled with it."""

NEXT_ROLLOUT = Deadline("next rollout", "rollouts", 1)
"""Before an update is applied that the second rollout asks for."""


def updates(count: int) -> Deadline:
    """Before more than ``count`` updates are applied."""
    return Deadline(f"{count} update{'s' * (count > 1)}", "updates", count)


def rollouts(count: int) -> Deadline:
    """Before the update that follows ``count`` rollouts, the first of which no update precedes."""
    return Deadline(f"{count} rollouts", "rollouts", count - 1)


def samples(count: int) -> Deadline:
    """Before more than ``count`` completions, in whole rollouts, are trained on."""
    return Deadline(f"{count} samples", "samples", count)


@dataclass
class Stage:
    """A run that is about to begin; injectors change it.

    Attributes:
        model: Folder of the model.
        engine: The engine.
        folder: A folder that lives as long as the run.
        module: Arguments of `GRPOModule`.
        data: Arguments of `RolloutDataModule`.
        trainer: Arguments of the Trainer.
        callbacks: Further callbacks.
    """

    model: str
    engine: RolloutEngine
    folder: Path
    module: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]
    callbacks: list[Callback] = field(default_factory=list)
    _patches: list[Any] = field(default_factory=list)
    _noted: list[bool] = field(default_factory=list)

    def note(self, changed: bool) -> None:
        """Injectors that may have nothing to change say whether they changed something.

        Args:
            changed: Whether they did, this time.
        """
        self._noted.append(changed)

    @property
    def injected(self) -> bool:
        """Whether something was changed, as far as injectors say so."""
        return not self._noted or any(self._noted)

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace an attribute of a class or module during the run.

        Args:
            owner: The class or module.
            name: The attribute.
            make: From what it is (by then, so that several wrap each other) to what takes its place.
        """
        self._patches.append((owner, name, make))

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The replacements are in place within this context."""
        with ExitStack() as stack:
            for owner, name, make in self._patches:
                stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
            yield


Injector = Callable[[Stage], None]


@dataclass(frozen=True)
class Fault:
    """A fault of the zoo.

    Attributes:
        name: Stable name.
        description: What somebody did wrong, in a sentence.
        expected: The cause that must be named, then other names that are as true.
        deadline: When at the latest.
        inject: Puts it into a run.
        reaction: ``"halt"`` or ``"warn"``.
        engine: Which engine it needs, a key of `engines.VLLM`.
        why_alias: Why the other names are as true; needed where there are any.
        guard: A guard of the code itself refuses to go on before the doctor is asked; what it raises names the cause.
        needs_vllm: It has no meaning with transformers as the engine.
    """

    name: str
    description: str
    expected: tuple[str, ...]
    deadline: Deadline
    inject: Injector
    reaction: Reaction = "halt"
    engine: str = "float32"
    why_alias: str = ""
    guard: bool = False
    needs_vllm: bool = False


ZOO: dict[str, Fault] = {}
"""All faults by name; `zoo` fills it."""


def fault(*expected: str, deadline: Deadline, **choices: Any) -> Callable[[Injector], Injector]:
    """Add an injector to the zoo, under its name and with its docstring as the description.

    Args:
        *expected: The causes, as in `Fault`.
        deadline: As in `Fault`.
        **choices: Further fields of `Fault`.
    """
    assert set(expected) <= set(BY_NAME), expected

    def add(inject: Injector) -> Injector:
        name = inject.__name__
        assert inject.__doc__, name
        assert name not in ZOO, name
        description = " ".join(inject.__doc__.split())
        ZOO[name] = Fault(name, description, expected, deadline, inject, **choices)
        assert bool(ZOO[name].why_alias) == (len(expected) > 1), name
        return inject

    return add

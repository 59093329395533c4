"""Runs of a tiny model: what is wrong with each, or that it is healthy."""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import zoo
from benchmarks.faults.fault import ZOO, Stage
from benchmarks.faults.healthy import CONFIGS
from benchmarks.faults.runner import longer_is_better, make_stage
from grpo_lightning.rollout.engine import RolloutEngine

assert zoo.__all__

MODULE = {"kl_coef": 1e-3}
"""So that a KL is logged. The learning rate is that of all the zoo's runs."""
STOP = list(string.punctuation)
"""What ends a completion: nearly one in three of the untrained model's characters."""


def letters(completion: str) -> float:
    """Share of small letters among the characters before the one that ended it."""
    text = completion.rstrip(string.punctuation)
    return sum(character.islower() for character in text) / max(1, len(text))


DATA = {"rewards": letters, "prompts_per_rollout": 8, "max_tokens": 20, "stop": STOP, "val_size": 16}


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        name: Stable name.
        title: What is wrong, or what kind of healthy run it is.
        healthy: Whether nothing is wrong.
        causes: Names of what is wrong, among `diagnostics.causes.CAUSES`; none if the doctor knows no name for it.
        prepare: What the zoo of faults, or its healthy configurations, change in a run.
        module: Arguments of the module, whatever the zoo chose.
        data: Arguments of the data module, whatever the zoo chose.
    """

    name: str
    title: str
    healthy: bool = False
    causes: tuple[str, ...] = ()
    prepare: Callable[[Stage], None] | None = None
    module: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def stage(self, model: str, engine: RolloutEngine, folder: Path) -> Stage:
        """The run that is about to begin.

        Args:
            model: Folder of the model.
            engine: The engine.
            folder: A folder that lives as long as the run.
        """
        stage = make_stage(model, engine, folder)
        stage.module |= MODULE
        stage.data |= DATA
        if self.prepare is not None:
            self.prepare(stage)
        stage.module |= self.module
        stage.data |= self.data
        return stage


def _fault(name: str, **own: Any) -> Case:
    fault = ZOO[name]
    return Case(name, fault.description, causes=fault.expected, prepare=fault.inject, **own)


def _healthy(name: str, title: str, config: str = "", **own: Any) -> Case:
    return Case(name, title, healthy=True, prepare=CONFIGS[config].prepare if config else None, **own)


CASES: tuple[Case, ...] = (
    _fault("old_is_current"),
    _fault("lr_zero"),
    _fault("optimizer_of_copies"),
    _fault("frozen_parameters"),
    _fault("nan_steps_skipped"),
    _fault("advantages_zeroed"),
    _fault("groups_shuffled", data={"rewards": letters}),
    _fault("loss_sign"),
    _fault("sync_noop"),
    _fault("sync_one_behind"),
    _fault("wrong_temperature"),
    _fault("logprobs_zero_filled"),
    _fault("forced_by_the_engine"),
    _fault("frozen_behind_dropout", data={"inner_epochs": 1}),
    _fault("learning_rate_without_its_exponent"),
    # Fast enough to show.
    Case(
        "pays_for_length",
        "The reward pays for length.",
        module={"learning_rate": 1e-3},
        data={"rewards": longer_is_better},
    ),
    _healthy("two_updates", "Two updates for each rollout."),
    _healthy("one_update", "One update for each rollout.", data={"updates_per_rollout": 1}),
    _healthy("four_updates", "Four updates for each rollout.", "float32, four updates"),
    _healthy(
        "warm_up",
        "The learning rate rises from 0, then falls to 0.",
        "warm-up from 0",
        module={"lr_schedule": "linear"},
    ),
    _healthy("solved", "A solved task: all rewards are 1.", "solved task"),
)
"""Faults first; ``two_updates`` is the healthy twin of all of them."""

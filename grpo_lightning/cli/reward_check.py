"""``reward-check``: the rewards on known answers, without loading a model."""

import argparse
import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lightning.cli.lightning_command import check_config_files
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.episode import said
from grpo_lightning.rollout.types import Task

KINDS = ("gold", "wrong", "empty")
_RENDERINGS = ("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "#### {}")
"""How completions commonly mark their answer."""

_ANY_MACHINE = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
    "--trainer.plugins=null",
    "--trainer.logger=false",
    "--trainer.callbacks=null",
)
"""Settings that win over the run's: its devices and loggers need not be where its rewards are checked."""


@dataclass(frozen=True)
class Result:
    """What one reward gave to completions of one kind.

    Attributes:
        reward: Name of the reward.
        kind: One of `KINDS`.
        values: Its values; None where it does not apply.
        seconds: Duration of all calls.
    """

    reward: str
    kind: str
    values: tuple[float | None, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean where it applies; NaN if nowhere."""
        applied = [value for value in self.values if value is not None]
        return math.fsum(applied) / len(applied) if applied else math.nan


def main(command: str, args: list[str]) -> None:
    """Score the answers of the first tasks and print a table.

    Raises:
        ConfigurationError: If there is no reward function, or one asks for a field that the tasks lack.
        RewardError: If a reward raises, runs out of time or returns no reward, with its name and the task.
    """
    parser = argparse.ArgumentParser(
        f"grpo-lightning {command}",
        allow_abbrev=False,
        description="Call the rewards on a right, a wrong and an empty completion of the first tasks, "
        "without loading a model. Other arguments are settings, as for fit.",
        epilog="The right completion is the task's field 'answer', plain or marked as an answer, whichever scores "
        "best; the wrong one is the answer of another task.",
    )
    parser.add_argument("-n", type=int, default=8, help="how many tasks (8)")
    given, settings = parser.parse_known_args(args)
    check_config_files(settings)
    if given.n < 1:
        raise ConfigurationError(f"expected -n >= 1, but got {given.n}")
    from grpo_lightning.cli.lightning_cli import run_lightning

    data: Any = run_lightning(["fit", *settings, *_ANY_MACHINE], dispatch=False).datamodule
    tasks = [data.tasks[i] for i in range(min(given.n, len(data.tasks)))]
    if not data.scorer.names:
        raise ConfigurationError(
            f"expected at least one reward function for {command} to call, but there is none: the environment gives "
            "all rewards, and only episodes can show them"
        )
    results = check(data.scorer, tasks)
    print(table(results))
    print(f"{len(tasks)} tasks, {sum(len(r.values) for r in results)} completions scored.")
    for warning in warnings_of(results):
        print(f"warning: {warning}")


def check(scorer: Scorer, tasks: Sequence[Task]) -> list[Result]:
    """Call every reward on completions of every kind that the tasks allow.

    Args:
        scorer: The rewards.
        tasks: At least one task.

    Raises:
        ConfigurationError: If a reward asks for a field that a task lacks.
        RewardError: If a reward fails.
    """
    for task in tasks:
        scorer.check(task)
    strict = scorer.raising()
    # One event loop for all: clients of asynchronous rewards stay tied to the loop of their first call.
    with asyncio.Runner() as runner:
        return [r for name in scorer.names for r in _check_one(runner, strict.only([name]), name, tasks)]


def _check_one(runner: asyncio.Runner, scorer: Scorer, name: str, tasks: Sequence[Task]) -> list[Result]:
    def score(task: Task, completion: str) -> float | None:
        rewards = runner.run(scorer.score(task, said(task, completion))).rewards
        return rewards[name]

    rendering = _best_rendering(score, tasks)
    completions = {
        "gold": [(task, rendering.format(task.data["answer"])) for task in tasks if "answer" in task.data],
        "wrong": [(task, rendering.format(_wrong_answer(task, tasks))) for task in tasks],
        "empty": [(task, "") for task in tasks],
    }
    results = []
    for kind, pairs in completions.items():
        begin = time.perf_counter()
        values = tuple(score(task, completion) for task, completion in pairs)
        results.append(Result(name, kind, values, time.perf_counter() - begin))
    return results


def _best_rendering(score: Callable[[Task, str], float | None], tasks: Sequence[Task]) -> str:
    first = next((task for task in tasks if "answer" in task.data), None)
    if first is None:
        return _RENDERINGS[0]

    def value(rendering: str) -> float:
        given = score(first, rendering.format(first.data["answer"]))
        return -math.inf if given is None else given

    return max(_RENDERINGS, key=value)


def _wrong_answer(task: Task, tasks: Sequence[Task]) -> str:
    right = str(task.data.get("answer"))
    others = (str(other.data["answer"]) for other in tasks if "answer" in other.data)
    return next((answer for answer in others if answer != right), "I do not know.")


def table(results: Sequence[Result]) -> str:
    """One line a reward and kind."""
    width = max(len("reward"), *(len(r.reward) for r in results))
    lines = [f"{'reward':<{width}}  kind   count    mean  seconds"]
    lines += [
        f"{r.reward:<{width}}  {r.kind:<5}  {len(r.values):>5}  "
        + (f"{r.mean:>6.3f}  {r.seconds:>7.3f}" if r.values else "     -        -")
        for r in results
    ]
    return "\n".join(lines)


def warnings_of(results: Sequence[Result]) -> list[str]:
    """Rewards that cannot tell right from wrong."""
    found = []
    for name in dict.fromkeys(r.reward for r in results):
        mine = [r for r in results if r.reward == name]
        seen = {value for r in mine for value in r.values}
        kinds = [r.kind for r in mine if r.values]
        if len(seen) == 1:
            found.append(
                f"reward {name!r} gives {seen.pop()} to every {', '.join(kinds)} completion: it teaches nothing"
            )
            continue
        gold, wrong = (next((r.mean for r in mine if r.kind == kind), math.nan) for kind in ("gold", "wrong"))
        # Not where one of them was never scored: NaN compares as false.
        if gold <= wrong:
            found.append(
                f"reward {name!r} gives right completions {gold:.3f} on average and wrong ones {wrong:.3f}: expected "
                "more for right ones"
            )
    return found

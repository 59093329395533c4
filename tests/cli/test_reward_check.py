"""Rewards on known answers, before anything is trained."""

import asyncio

import pytest
from own_parts import constant, in_tags

from grpo_lightning.cli import main
from grpo_lightning.cli.reward_check import check, table, warnings_of
from grpo_lightning.rewards import last_number_correct
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import SumTasks

SUMS = [SumTasks(5)[i] for i in range(8)]
UNANSWERED = [Task(str(i), ({"role": "user", "content": "Hello"},), {}) for i in range(3)]


def test_a_good_reward_tells_gold_from_wrong_and_empty():
    results = check(Scorer([last_number_correct]), SUMS)
    assert [(r.reward, r.kind, r.mean, len(r.values)) for r in results] == [
        ("last_number_correct", "gold", 1.0, 8),
        ("last_number_correct", "wrong", 0.0, 8),
        ("last_number_correct", "empty", 0.0, 8),
    ]
    assert warnings_of(results) == []


def test_answers_are_marked_as_the_reward_wants_them():
    results = check(Scorer([in_tags]), SUMS)
    assert [r.mean for r in results] == [1.0, 0.0, 0.0]


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    from grpo_lightning.rewards import ReasoningGymReward
    from grpo_lightning.tasks import ReasoningGymTasks

    tasks = ReasoningGymTasks("chain_sum", size=4)
    results = check(Scorer([ReasoningGymReward()]), [tasks[i] for i in range(4)])
    assert results[0].mean == 1.0
    assert results[1].mean < 0.5
    assert results[2].mean == 0.0


def test_an_asynchronous_reward_keeps_its_event_loop():
    loops = set()

    async def remote(completion):
        loops.add(asyncio.get_running_loop())
        return float(len(completion))

    assert check(Scorer([remote]), SUMS)[2].mean == 0.0
    assert len(loops) == 1


def test_without_answers_gold_is_skipped():
    results = check(Scorer([constant]), UNANSWERED)
    assert [(r.kind, len(r.values)) for r in results] == [("gold", 0), ("wrong", 3), ("empty", 3)]
    assert table(results).splitlines()[1].split() == ["constant", "gold", "0", "-", "-"]


def test_the_same_for_everything_is_called_out():
    assert warnings_of(check(Scorer([constant, last_number_correct]), SUMS)) == [
        "reward 'constant' gives 0.5 to every gold, wrong, empty completion: it teaches nothing"
    ]


def test_a_reward_that_prefers_wrong_answers_is_called_out():
    def backwards(completion, answer):
        return 0.0 if answer in completion or not completion else 1.0

    tasks = [Task(a, ({"role": "user", "content": "?"},), {"answer": a}) for a in "xyz"]
    assert warnings_of(check(Scorer([backwards]), tasks)) == [
        "reward 'backwards' gives right completions 0.000 on average and wrong ones 1.000: expected more for right ones"
    ]


def test_the_runs_devices_and_loggers_are_not_needed(settings, folder):
    args = ["--trainer.accelerator=gpu", "--trainer.devices=8", "--trainer.strategy=ddp", "--trainer.precision=16-true"]
    loggers = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline=true"]
    assert main(["reward-check", *settings, *args, *loggers]) == 0
    assert [path.name for path in folder.iterdir()] == ["small.yaml"]


def test_the_command_prints_a_table(settings, capsys):
    args = ["reward-check", *settings, "-n", "3", "--data.rewards=[grpo_lightning.rewards.last_number_correct]"]
    assert main([*args, "--data.engine=grpo_lightning.VLLMEngine", "--model.model=models/that/is/not/there"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["reward", "kind", "count", "mean", "seconds"]
    assert lines[1].split()[:4] == ["last_number_correct", "gold", "3", "1.000"]
    assert lines[2].split()[:4] == ["last_number_correct", "wrong", "3", "0.000"]
    assert lines[3].split()[:4] == ["last_number_correct", "empty", "3", "0.000"]
    assert lines[4] == "3 tasks, 9 completions scored."


def test_the_command_warns(settings, capsys):
    assert main(["reward-check", *settings, "--data.rewards=[own_parts.constant]"]) == 0
    assert "warning: reward 'constant' gives 0.5 to every gold, wrong, empty completion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "code", "message"),
    [
        ("not_a_number", 1, "expected reward 'not_a_number' to return a finite number or None, but got nan on task"),
        ("text", 1, "expected reward 'text' to return a finite number or None, but got 'good' on task"),
        ("raises", 1, "reward 'raises' raised ZeroDivisionError: float division by zero on task"),
        ("slow", 1, "reward 'slow' took longer than 0.2 s on task"),
        ("wants_difficulty", 2, "reward 'wants_difficulty' asks for 'difficulty', but the tasks have 'answer'"),
    ],
)
def test_a_broken_reward_is_named_with_its_task(settings, reward, code, message, capsys):
    # Also where the run would skip the completion.
    args = [f"--data.rewards=[own_parts.{reward}]", "--data.reward_timeout=0.2", "--data.reward_errors=skip"]
    assert main(["reward-check", *settings, *args]) == code
    assert message in capsys.readouterr().err


def test_wrong_counts(settings, capsys):
    assert main(["reward-check", *settings, "-n", "0"]) == 2
    assert "expected -n >= 1, but got 0" in capsys.readouterr().err


def test_without_reward_functions_there_is_nothing_to_check(settings, folder, capsys):
    given = ["--data.environment=games.Echo", "--data.rewards=null"]
    assert main(["reward-check", *settings, *given]) == 2
    assert "at least one reward function for reward-check to call, but there is none" in capsys.readouterr().err

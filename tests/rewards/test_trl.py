"""Functions with TRL's signature run as they are."""

import asyncio

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from grpo_lightning import RolloutDataModule
from grpo_lightning.errors import ConfigurationError, RewardError
from grpo_lightning.rewards import Scorer, TRLReward
from grpo_lightning.rollout.episode import said
from grpo_lightning.rollout.types import Task

TASK = Task(
    "sum-1",
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 2?"}),
    {"answer": "3", "level": 2},
)


def score(reward, task=TASK, completion="It is 3", **settings):
    scorer = Scorer([reward], **settings)
    scorer.check(task)
    scored = asyncio.run(scorer.score(task, said(task, completion)))
    return dict(scored.rewards), scored.total, scored.failure


def correct(completions, answer, **kwargs):
    """As TRL's documentation writes them, for conversational data."""
    return [1.0 if a in c[0]["content"] else 0.0 for c, a in zip(completions, answer, strict=True)]


def correct_text(completions, answer, **kwargs):
    return [1.0 if a in c else 0.0 for c, a in zip(completions, answer, strict=True)]


def test_conversational():
    assert score(TRLReward(correct)) == ({"correct": 1.0}, 1.0, None)
    assert score(TRLReward(correct), completion="It is 4")[1] == 0.0


def test_texts():
    assert score(TRLReward(correct_text, conversational=False))[1] == 1.0
    assert score(TRLReward(correct_text, conversational=False), completion="4")[1] == 0.0


@pytest.mark.parametrize(
    ("conversational", "prompt", "completion"),
    [
        (True, [dict(m) for m in TASK.messages], [{"role": "assistant", "content": "It is 3"}]),
        (False, "What is 1 + 2?", "It is 3"),
    ],
)
def test_every_argument_is_a_list_of_one(conversational, prompt, completion):
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.5]

    assert score(TRLReward(reward, conversational))[1] == 0.5
    assert seen == {
        "prompts": [prompt], "completions": [completion], "answer": ["3"], "level": [2], "task_id": ["sum-1"],
    }  # fmt: skip


def test_without_keywords_only_what_it_names_is_passed():
    def reward(completions, level, trainer_state=None):
        return [float(level[0]) if trainer_state is None else -1.0]

    assert score(TRLReward(reward))[1] == 2.0


def test_async():
    async def reward(completions, **kwargs):
        await asyncio.sleep(0)
        return [len(completions[0][0]["content"])]

    assert score(TRLReward(reward)) == ({"reward": 7.0}, 7.0, None)


def test_none_does_not_apply():
    assert score(TRLReward(lambda completions, **kwargs: [None])) == (
        {"lambda": None}, None, None,
    )  # fmt: skip


@pytest.mark.parametrize("result", [[], [1.0, 2.0], 1.0, None])
@pytest.mark.parametrize("is_async", [False, True])
def test_anything_but_a_list_of_one_is_refused_by_name(result, is_async):
    def plain(completions, **kwargs):
        return result

    async def later(completions, **kwargs):
        return result

    reward = later if is_async else plain
    with pytest.raises(RewardError, match=f"TRL reward '{reward.__name__}' to return a list of one value") as caught:
        score(TRLReward(reward))
    assert repr(result) in str(caught.value)


@pytest.mark.parametrize("value", ["1", float("nan")])
def test_what_is_no_number_is_refused_as_of_every_reward(value):
    with pytest.raises(RewardError, match="expected reward 'lambda' to return a finite number"):
        score(TRLReward(lambda completions, **kwargs: [value]))


def test_what_the_tasks_lack_is_refused_before_training():
    def reward(completions, solution, completion_ids, **kwargs):
        return [0.0]

    with pytest.raises(ConfigurationError, match="reward 'reward' asks for 'solution', 'completion_ids', but"):
        score(TRLReward(reward))


def test_in_yaml_by_import_path():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(RolloutDataModule, "data")
    settings = {
        "tasks": {"class_path": "grpo_lightning.tasks.SumTasks"},
        "engine": "fakes.FakeEngine",
        "rewards": [
            {
                "class_path": "grpo_lightning.rewards.TRLReward",
                "init_args": {"function": f"{__name__}.correct_text", "conversational": False},
            }
        ],
    }
    data = parser.instantiate_classes(parser.parse_string(yaml.safe_dump({"data": settings}))).data
    assert data.scorer.names == ("correct_text",)
    task = data.tasks[0]
    assert asyncio.run(data.scorer.score(task, said(task, task.data["answer"]))).total == 1.0

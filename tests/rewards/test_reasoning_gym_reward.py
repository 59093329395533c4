import pytest

from grpo_lightning.rewards import ReasoningGymReward, Scorer
from grpo_lightning.tasks import ReasoningGymTasks

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def task():
    return ReasoningGymTasks("chain_sum", size=3, seed=1)[2]


def score(task, completion, **settings):
    return ReasoningGymReward(**settings)(completion, reasoning_gym_entry=task.data["reasoning_gym_entry"])


def test_tagged_answer_earns_everything(task):
    result = score(task, f"Let me see. <answer>{task.data['answer']}</answer>")
    assert result == 1.0
    assert type(result) is float


def test_wrong_answer_earns_less(task):
    assert score(task, "<answer>999999999</answer>") < 0.5


@pytest.mark.parametrize("frame", ["{}", "The answer is {}.", "<answer>{}", "{}</answer>", "<result>{}</result>"])
def test_right_answer_without_tags_earns_nothing(task, frame):
    assert score(task, frame.format(task.data["answer"])) == 0.0


def test_listing_numbers_does_not_pay(task):
    everything = " ".join(map(str, range(-2000, 2000)))
    assert score(task, everything) == 0.0
    assert score(task, "") == 0.0


def test_tag_can_be_changed(task):
    answer = task.data["answer"]
    assert score(task, f"<result>{answer}</result>", tag="result") == 1.0
    assert score(task, f"<answer>{answer}</answer>", tag="result") == 0.0


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic", "leg_counting", "gcd"])
def test_the_datasets_own_answers_earn_everything(name):
    for task in ReasoningGymTasks(name, size=5, seed=0):
        assert score(task, f"<answer>{task.data['answer']}</answer>") == 1.0


def test_scorer_finds_its_field(task):
    scorer = Scorer([ReasoningGymReward()])
    scorer.check(task)
    assert scorer.names == ("ReasoningGymReward",)

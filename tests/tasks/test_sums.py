import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import SumTasks


@pytest.mark.parametrize("largest", [1, 2, 20])
def test_every_sum_once(largest):
    tasks = list(SumTasks(largest))
    assert len(tasks) == len(SumTasks(largest)) == (largest + 1) ** 2
    expected = {f"{a}+{b}" for a in range(largest + 1) for b in range(largest + 1)}
    assert {t.id for t in tasks} == expected


def test_question_and_answer_belong_together():
    for task in SumTasks(12):
        a, b = map(int, task.id.split("+"))
        assert task.messages == ({"role": "user", "content": f"What is {a} + {b}?"},)
        assert task.data == {"answer": str(a + b)}


def test_same_index_same_task():
    assert SumTasks(5)[17] == SumTasks(5)[17]
    assert SumTasks(5)[17] != SumTasks(5)[18]


@pytest.mark.parametrize("index", [-1, 9, 1000])
def test_index_outside_is_refused(index):
    with pytest.raises(IndexError):
        SumTasks(2)[index]


@pytest.mark.parametrize("largest", [0, -3])
def test_nothing_to_add_is_refused(largest):
    with pytest.raises(ConfigurationError, match=f"max_number >= 1, but got {largest}"):
        SumTasks(largest)

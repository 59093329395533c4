import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import Subset, SumTasks, TaskSource, hold_out


class Numbers:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return Task(str(index), ({"role": "user", "content": f"{index}?"},), {})


def ids(source):
    return [source[i].id for i in range(len(source))]


def test_hold_out_does_not_touch_the_global_random_state():
    random.seed(5)
    expected = random.Random(5).random()
    hold_out(Numbers(50), 5, seed=99)
    assert random.random() == expected


def test_hold_out_is_the_same_in_every_version_of_the_package():
    # Resuming a run after an upgrade must not train on tasks that were held out.
    assert ids(hold_out(Numbers(10), 4, seed=0)[1]) == ["8", "9", "0", "5"]


@settings(max_examples=60)
@given(data=st.data(), size=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_hold_out_is_a_partition(data, size, seed):
    count = data.draw(st.integers(0, size - 1))
    train, held = hold_out(Numbers(size), count, seed)
    assert len(held) == count
    assert len(train) == size - count
    assert set(ids(train)).isdisjoint(ids(held))
    assert sorted(ids(train) + ids(held), key=int) == [str(i) for i in range(size)]


def test_hold_out_repeats_and_depends_on_the_seed():
    source = Numbers(100)
    first, again, other = (ids(hold_out(source, 20, seed)[1]) for seed in (7, 7, 8))
    assert first == again
    assert set(first) != set(other)


def test_hold_out_is_a_draw_and_not_the_end_of_the_source():
    held = {int(i) for i in ids(hold_out(Numbers(100), 20, 0)[1])}
    assert held != set(range(80, 100))
    assert held != set(range(20))


@pytest.mark.parametrize("count", [10, 11, 10**9, -1])
def test_hold_out_refuses_to_leave_nothing(count):
    with pytest.raises(ConfigurationError, match=rf"10 tasks of the source, but val_size is {count}$"):
        hold_out(Numbers(10), count, 0)


def test_hold_out_of_an_empty_source_is_refused():
    with pytest.raises(ConfigurationError, match="0 tasks"):
        hold_out(Numbers(0), 0, 0)


def test_subset_keeps_the_given_order_and_ends():
    subset = Subset(Numbers(10), [7, 2, 2])
    assert ids(subset) == ["7", "2", "2"]
    assert [t.id for t in subset] == ["7", "2", "2"]
    with pytest.raises(IndexError):
        subset[3]


def test_subset_does_not_follow_later_changes_of_its_indices():
    indices = [1, 2]
    subset = Subset(Numbers(10), indices)
    indices.append(3)
    assert len(subset) == 2


def test_protocol_is_structural():
    assert isinstance(SumTasks(2), TaskSource)
    assert isinstance(Subset(Numbers(2), [0]), TaskSource)
    assert not isinstance(3, TaskSource)

import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import Widening, sequential, shuffled
from grpo_lightning.tasks.order import draw

ORDERS = [shuffled, sequential, Widening(0.1, 40), Widening(1.0, 1), Widening(1e-9, 7)]


@given(size=st.integers(1, 60), first_pass=st.integers(0, 5), seed=st.integers(-10, 2**40))
def test_every_shuffled_pass_visits_each_index_exactly_once(size, first_pass, seed):
    order = [shuffled(first_pass * size + i, size, seed) for i in range(size)]
    assert sorted(order) == list(range(size))


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_needs_no_state_and_survives_out_of_order_access(order):
    size, seed = 7, 3
    forward = [order(i, size, seed) for i in range(70)]
    positions = list(range(70))
    random.Random(0).shuffle(positions)
    again = {p: order(p, size, seed) for p in positions}
    assert [again[p] for p in range(70)] == forward


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_does_not_touch_the_global_random_state(order):
    random.seed(5)
    expected = random.Random(5).random()
    order(0, 1000, 12345)
    assert random.random() == expected


@pytest.mark.parametrize("order", ORDERS)
@given(position=st.integers(0, 10**6), size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_indices_are_in_range(order, position, size, seed):
    assert 0 <= draw(order, position, size, seed) < size


def test_passes_differ_and_seeds_differ():
    passes = [tuple(shuffled(p * 30 + i, 30, 0) for i in range(30)) for p in range(4)]
    assert len(set(passes)) == 4
    assert passes[0] != tuple(range(30))
    assert [shuffled(i, 30, 1) for i in range(30)] != list(passes[0])


def test_orders_are_the_same_in_every_version_of_the_package():
    # Resuming a run after an upgrade must continue the same order.
    assert [shuffled(i, 10, 0) for i in range(12)] == [8, 4, 0, 9, 5, 1, 2, 7, 3, 6, 7, 3]
    assert [Widening(0.1, 12)(i, 10, 0) for i in range(14)] == [0, 0, 1, 1, 1, 2, 2, 2, 0, 3, 3, 6, 4, 5]


def test_sequential_is_the_order_of_the_source():
    assert [sequential(i, 3, 99) for i in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_widening_draws_from_a_part_that_grows_linearly():
    order = Widening(start=0.2, positions=100)
    # After half of the positions the part is 0.2 + 0.8 / 2 = 0.6 of the tasks.
    reach = {position: max(order(position, 1000, seed) for seed in range(2000)) for position in (0, 50, 99)}
    assert 190 <= reach[0] < 200
    assert 580 <= reach[50] < 600
    assert 970 <= reach[99] < 992
    assert min(order(50, 1000, seed) for seed in range(2000)) < 10


def test_widening_ends_as_shuffled():
    order = Widening(start=0.5, positions=20)
    assert [order(i, 10, 4) for i in range(20, 60)] == [shuffled(i, 10, 4) for i in range(20, 60)]
    assert [order(i, 10, 4) for i in range(20)] != [shuffled(i, 10, 4) for i in range(20)]


def test_widening_depends_on_the_seed():
    assert [Widening()(i, 1000, 0) for i in range(20)] != [Widening()(i, 1000, 1) for i in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.0}, "start to be a share above 0 and at most 1, but got 0.0"),
        ({"start": 1.5}, "at most 1, but got 1.5"),
        ({"start": float("nan")}, "but got nan"),
        ({"positions": 0}, "positions >= 1, but got 0"),
    ],
)
def test_widening_refuses_settings_without_meaning(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Widening(**settings)


class Off:
    def __init__(self, index):
        self.index = index

    def __call__(self, position, size, seed):
        return self.index


@pytest.mark.parametrize("index", [-1, 5, 10**9, 2.5, None, "1"])
def test_an_index_outside_the_source_is_refused_by_name(index):
    message = rf"the order Off .* one of 5 tasks \(0 to 4\), but got {index!r} at position 17$"
    with pytest.raises(ConfigurationError, match=message):
        draw(Off(index), 17, 5, 0)


def test_functions_and_partials_are_named():
    def beyond(position, size, seed):
        return size

    with pytest.raises(ConfigurationError, match="the order beyond"):
        draw(beyond, 0, 5, 0)
    with pytest.raises(ConfigurationError, match="the order partial"):
        draw(partial(beyond), 0, 5, 0)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.reward_shaping import overlong_penalty

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("length", "expected"),
    # Free up to 80 of 100 tokens, then 1 / 20 per token.
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (10**6, -1.0)],
)
def test_golden_numbers(length, expected):
    assert overlong_penalty(length, max_length=100, buffer=20) == expected


def test_ends_of_the_buffer():
    assert [overlong_penalty(n, max_length=4, buffer=0) for n in (4, 5)] == [0.0, -1.0]
    assert [overlong_penalty(n, max_length=4, buffer=4) for n in range(6)] == [0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


@PROPERTY
@given(st.integers(0, 300), st.integers(1, 200), st.data())
def test_equals_what_is_beyond_cut_off(length, max_length, data):
    buffer = data.draw(st.integers(1, max_length))
    beyond = sum(1 for token in range(length) if token >= max_length - buffer)
    assert overlong_penalty(length, max_length=max_length, buffer=buffer) == pytest.approx(-min(beyond / buffer, 1))


@PROPERTY
@given(st.integers(0, 300), st.integers(1, 200), st.data())
def test_never_rises(length, max_length, data):
    buffer = data.draw(st.integers(0, max_length))
    here, next_one = (overlong_penalty(n, max_length=max_length, buffer=buffer) for n in (length, length + 1))
    assert -1 <= next_one <= here <= 0


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="expected length >= 0 and max_length >= 1, but got -1 and 5"):
        overlong_penalty(-1, max_length=5, buffer=1)
    with pytest.raises(ValueError, match="expected length >= 0 and max_length >= 1, but got 1 and 0"):
        overlong_penalty(1, max_length=0, buffer=0)
    for buffer in (-1, 6):
        with pytest.raises(ValueError, match=f"expected a buffer from 0 to max_length = 5, but got {buffer}"):
            overlong_penalty(1, max_length=5, buffer=buffer)

import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.errors import LedgerError, RolloutError
from grpo_lightning.rollout.ledger import NO_VERSION, POSITIVE_TOLERANCE, Ledger, Source

P, S, F, E = Source
NAN = math.nan


def columns(**changed):
    """Two prompt tokens, two sampled ones, a forced one, one of the environment, a sampled one."""
    return {
        "token_ids": [10, 11, 20, 21, 22, 30, 40],
        "source": [P, P, S, S, F, E, S],
        "logprobs": [NAN, NAN, -0.5, -1.5, NAN, NAN, -2.5],
        "policy_version": [-1, -1, 7, 7, -1, -1, 8],
        "turn": [0, 0, 0, 0, 0, 1, 1],
        **changed,
    }


def test_columns_are_kept():
    ledger = Ledger(**columns())
    for name, values in columns().items():
        assert np.array_equal(getattr(ledger, name), values, equal_nan=name == "logprobs"), name
    assert {f.name: getattr(ledger, f.name).dtype for f in fields(ledger)} == {
        "token_ids": np.int64,
        "source": np.int8,
        "logprobs": np.float64,
        "policy_version": np.int64,
        "turn": np.int64,
    }
    assert len(ledger) == 7
    assert ledger.sampled.tolist() == [False, False, True, True, False, False, True]
    assert (ledger.prompt_length, ledger.prompt_ids) == (2, (10, 11))
    assert [ledger.count(source) for source in Source] == [2, 3, 1, 1]


def test_built_turn_by_turn_it_is_the_same():
    ledger = Ledger.of_prompt([10, 11]).extended([20, 21], S, 0, [-0.5, -1.5], 7).extended([22], F, 0)
    ledger = ledger.extended([30], E, 1).extended([40], S, 1, [-2.5], 8)
    assert ledger == Ledger(**columns())
    assert Ledger.of_prompt((4,), turn=3).turn.tolist() == [3]
    assert NO_VERSION == -1


REFUSALS = {
    "nothing": ({key: [] for key in columns()}, "begins with all of its prompt tokens, at least one"),
    "one column too short": (columns(turn=[0] * 6), r"expected columns of one length, but got .*'turn': \(6,\)"),
    "one column too long": (columns(token_ids=[1] * 8), r"columns of one length, but got {'token_ids': \(8,\)"),
    "two dimensions": ({k: [v] for k, v in columns().items()}, r"columns of one length, but got .*\(1, 7\)"),
    "unknown source": (columns(source=[P, P, S, S, 4, E, S]), "expected sources 0 to 3, but got 4"),
    "negative source": (columns(source=[P, P, S, S, -1, E, S]), "expected sources 0 to 3, but got -1"),
    "no prompt": (columns(source=[E, E, S, S, F, E, S]), "begins with all of its prompt tokens, at least one"),
    "prompt behind": (columns(source=[P, E, S, S, P, E, S]), "begins with all of its prompt tokens, at least one"),
    "negative token": (columns(token_ids=[1, 2, 3, -4, 5, 6, 7]), "expected token ids >= 0, but got -4"),
    "sampled without logprob": (
        columns(logprobs=[NAN, NAN, -0.5, NAN, NAN, NAN, -2.5]),
        "finite logprob <= 0 of each sampled token, but 1 of 3 have none, for example nan",
    ),
    "logprob None": (
        columns(logprobs=[NAN, NAN, None, None, NAN, NAN, -2.5]),
        "finite logprob <= 0 of each sampled token, but 2 of 3 have none, for example nan",
    ),
    "infinite logprob": (
        columns(logprobs=[NAN, NAN, -0.5, -math.inf, NAN, NAN, -2.5]),
        "but 1 of 3 have none, for example -inf",
    ),
    "positive logprob": (
        columns(logprobs=[NAN, NAN, -0.5, 0.01, NAN, NAN, -2.5]),
        "but 1 of 3 have none, for example 0.01",
    ),
    "prompt with logprob": (
        columns(logprobs=[NAN, -1.0, -0.5, -1.5, NAN, NAN, -2.5]),
        "expected no logprob of tokens that the policy did not sample, but some have one",
    ),
    "forced with logprob": (
        columns(logprobs=[NAN, NAN, -0.5, -1.5, -1.0, NAN, -2.5]),
        "expected no logprob of tokens that the policy did not sample, but some have one",
    ),
    "environment with logprob 0": (
        columns(logprobs=[NAN, NAN, -0.5, -1.5, NAN, 0.0, -2.5]),
        "expected no logprob of tokens that the policy did not sample, but some have one",
    ),
    "forced with a version": (
        columns(policy_version=[-1, -1, 7, 7, 7, -1, 8]),
        "expected no policy version of tokens that the policy did not sample, but some have one",
    ),
    "negative turn": (columns(turn=[-1, 0, 0, 0, 0, 1, 1]), "expected turns that start at 0 or later and never fall"),
    "falling turn": (columns(turn=[0, 0, 0, 0, 1, 0, 1]), "expected turns that start at 0 or later and never fall"),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_contradictions_are_refused(wrong, message):
    with pytest.raises(LedgerError, match=message) as caught:
        Ledger(**wrong)
    assert isinstance(caught.value, RolloutError)


BEGUN = Ledger.of_prompt([1, 2], turn=1)
WRONG_EXTENSIONS = {
    "sampled without logprobs": (([3, 4], S, 1), "but 2 of 2 have none, for example nan"),
    "too few logprobs": (([3, 4], S, 1, [-1.0], 0), "expected one logprob per sampled token, but got 1 for 2"),
    "too many logprobs": (([3], S, 1, [-1.0, -1.0], 0), "expected one logprob per sampled token, but got 2 for 1"),
    "no logprobs at all": (([3], S, 1, [], 0), "expected one logprob per sampled token, but got 0 for 1"),
    "forced with logprobs": (([3], F, 1, [-1.0]), "expected no logprob of tokens that the policy did not sample"),
    "environment with version": (([3], E, 1, None, 4), "expected no policy version of tokens that the policy did not"),
    "an earlier turn": (([3], E, 0), "expected turns that start at 0 or later and never fall"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_EXTENSIONS.values(), ids=WRONG_EXTENSIONS.keys())
def test_wrong_extensions_are_refused(arguments, message):
    with pytest.raises(LedgerError, match=message):
        BEGUN.extended(*arguments)
    assert Ledger.of_prompt([1, 2], turn=1) == BEGUN


def test_no_prompt_is_refused_and_a_second_one_as_well():
    with pytest.raises(LedgerError, match="at least one"):
        Ledger.of_prompt([])
    with pytest.raises(LedgerError, match="begins with all of its prompt tokens"):
        BEGUN.extended([3], E, 1).extended([4], P, 1)


def test_rounding_above_zero_is_allowed():
    assert BEGUN.extended([3], S, 1, [POSITIVE_TOLERANCE / 2], 0).logprobs[-1] == POSITIVE_TOLERANCE / 2


@pytest.mark.parametrize("name", columns())
def test_nothing_can_be_changed(name):
    given_ = {k: np.array(v, dtype=float if k == "logprobs" else int) for k, v in columns().items()}
    ledger = Ledger(**given_)
    for array in (getattr(ledger, name), getattr(ledger.extended([5], F, 1), name)):
        with pytest.raises(ValueError, match="read-only"):
            array[2] = 0
    with pytest.raises(FrozenInstanceError):
        setattr(ledger, name, given_[name])
    # The arrays that it was made from are the caller's own.
    before = getattr(ledger, name)[2]
    given_[name][2] = 5
    assert getattr(ledger, name)[2] == before


def test_equality_is_of_every_column():
    ledger = Ledger(**columns())
    for name, values in columns(
        token_ids=[10, 11, 20, 21, 22, 30, 41],
        source=[P, P, S, S, E, E, S],
        logprobs=[NAN, NAN, -0.5, -1.5, NAN, NAN, -2.25],
        policy_version=[-1, -1, 7, 7, -1, -1, 9],
        turn=[0, 0, 0, 0, 1, 1, 1],
    ).items():
        assert ledger != Ledger(**columns(**{name: values})), name
    assert ledger == Ledger(**columns())
    assert ledger != ledger.extended([1], F, 1)
    assert ledger == ledger.extended([], E, 1)
    assert ledger != columns()
    with pytest.raises(TypeError, match="unhashable"):
        hash(ledger)


pieces = st.lists(
    st.tuples(st.sampled_from([S, F, E]), st.lists(st.integers(0, 2**40), max_size=4), st.integers(0, 2)), max_size=6
)


@settings(max_examples=100, deadline=None)
@given(prompt=st.lists(st.integers(0, 99), min_size=1, max_size=4), first_turn=st.integers(0, 3), pieces=pieces)
def test_extended_equals_built_at_once(prompt, first_turn, pieces):
    ledger = Ledger.of_prompt(prompt, first_turn)
    rows = [(token, P, NAN, NO_VERSION, first_turn) for token in prompt]
    turn = first_turn
    for source, tokens, later in pieces:
        turn += later
        if source is S:
            values = [-(token % 7) / 3 for token in tokens]
            longer = ledger.extended(tokens, source, turn, values, turn + 5)
            rows += [(t, S, v, turn + 5, turn) for t, v in zip(tokens, values, strict=True)]
        else:
            longer = ledger.extended(tokens, source, turn)
            rows += [(t, source, NAN, NO_VERSION, turn) for t in tokens]
        assert longer.token_ids[: len(ledger)].tolist() == ledger.token_ids.tolist()
        ledger = longer
    at_once = Ledger(**{f.name: np.array(c) for f, c in zip(fields(Ledger), zip(*rows, strict=True), strict=True)})
    assert ledger == at_once
    assert ledger.prompt_ids == tuple(prompt)
    assert ledger.count(S) == int(ledger.sampled.sum()) == sum(row[1] == S for row in rows)

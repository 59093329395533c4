"""What all estimators promise; their numbers are tested one by one."""

import inspect
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from functional.judged_maker import binary_or_none, compared, known, make_judged
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.advantages import ESTIMATORS, NEEDS_EPISODES
from grpo_lightning.functional.advantages.judged import LARGEST

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SETTINGS = {"pass_at_k": {"k": 2}}
ALL = {name: partial(function, **SETTINGS.get(name, {})) for name, function in ESTIMATORS.items()}
WITH_FLOOR = ["group_std", "batch_std", "reinforce_pp", "reinforce_pp_baseline", "gdpo"]
OVER_BATCH = ["batch_std", "reinforce_pp", "reinforce_pp_baseline", "gdpo"]
every = pytest.mark.parametrize("name", ALL)


def judged_of(rewards, random):
    """With two single rewards, random lengths and greedy answers."""
    parts = [[[None, None] if r is None else [r, random.choice([None, 0.5, -1.0])] for r in row] for row in rewards]
    lengths = [[random.randint(1, 30) for _ in row] for row in rewards]
    greedy = [random.choice([0.0, 1.0]) for _ in rewards]
    return make_judged(rewards, lengths=lengths, greedy=greedy, parts=parts, weights=[1.0, 0.25])


def take(judged, prompts, samples=None):
    """Some prompts, and some samples of each."""
    samples = samples or list(range(judged.rewards_PG.shape[1]))
    cells = {name: getattr(judged, name)[prompts][:, samples] for name in ("rewards_PG", "valid_PG", "lengths_PG")}
    return replace(judged, **cells, greedy_P=judged.greedy_P[prompts], parts_PGK=judged.parts_PGK[prompts][:, samples])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@every
def test_names_and_documentation(name):
    assert ESTIMATORS[name].__name__ == name
    text = inspect.getdoc(ESTIMATORS[name])
    order = [text.index(f"\n{label}: ") for label in ("Source", "Peers", "Use")]
    assert order == sorted(order)
    assert "https://arxiv.org/abs/" in text
    assert set(ALL) >= NEEDS_EPISODES


@every
@PROPERTY
@given(rewards=binary_or_none, random=st.randoms(use_true_random=False))
def test_order_does_not_matter(name, rewards, random):
    judged = judged_of(rewards, random)
    prompts, samples = list(range(len(rewards))), list(range(len(rewards[0])))
    random.shuffle(prompts)
    random.shuffle(samples)
    close(ALL[name](take(judged, prompts, samples)), ALL[name](judged)[prompts][:, samples])


@every
@PROPERTY
@given(rewards=binary_or_none, random=st.randoms(use_true_random=False))
def test_what_is_not_valid_changes_nothing_and_gets_0(name, rewards, random):
    judged = judged_of(rewards, random)
    junk = random.choice([math.nan, math.inf, -math.inf, 1e300, -7.0])
    out = ~judged.valid_PG
    other = replace(
        judged,
        rewards_PG=judged.rewards_PG.masked_fill(out, junk),
        lengths_PG=judged.lengths_PG.masked_fill(out, -5),
        parts_PGK=judged.parts_PGK.masked_fill(out[:, :, None], junk),
    )
    advantages = ALL[name](other)
    assert advantages.dtype == torch.float64
    assert torch.isfinite(advantages).all()
    assert (advantages[out] == 0).all()
    assert torch.equal(advantages, ALL[name](judged))


@every
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.0, 1e6 + 0.1])
@pytest.mark.parametrize("samples", [1, 3, 7])
def test_equal_rewards_give_exactly_0(name, value, samples):
    judged = make_judged([[value] * samples] * 3, greedy=[value] * 3, lengths=[[3, 5, 7, 11, 13, 17, 19][:samples]] * 3)
    floor = {"std_floor": 1e-300} if name in WITH_FLOOR else {}
    if samples >= 2 or name != "pass_at_k":
        assert (ALL[name](judged, **floor) == 0).all()


@every
def test_equal_rewards_of_one_group_give_exactly_0_beside_others(name):
    groups = [[0.1] * 7, [0.0, 1.0, 1.0, 0.0, 0.3, 1.0, 0.9], [0.7] * 6 + [None]]
    judged = make_judged(groups, greedy=[0.1, 0.5, 0.7], lengths=[[1, 2, 3, 4, 5, 6, 7]] * 3)
    floor = {"std_floor": 1e-300} if name in WITH_FLOOR else {}
    advantages = ALL[name](judged, **floor)
    assert (advantages[1] != 0).any()
    # REINFORCE++ alone compares prompts with each other.
    assert bool((advantages[[0, 2]] == 0).all()) is (name != "reinforce_pp")


@every
def test_a_sample_alone_in_its_group_gets_0_and_does_not_count(name):
    groups = [[0.0, 1.0, 1.0], [None, 7.0, None], [1.0, 0.0, 0.0], [None, None, None]]
    advantages = ALL[name](make_judged(groups, greedy=[0.0, 1.0, 0.0, None]))
    assert (advantages[1] == 0).all()
    assert (advantages[3] == 0).all()
    close(advantages[[0, 2]], ALL[name](make_judged([groups[0], groups[2]], greedy=[0.0, 0.0])))


@every
def test_nothing_valid(name):
    assert (ALL[name](make_judged([[None, None], [None, None]])) == 0).all()


@pytest.mark.parametrize("name", sorted(set(ALL) - set(OVER_BATCH)))
@PROPERTY
@given(rewards=binary_or_none, random=st.randoms(use_true_random=False))
def test_groups_do_not_see_each_other(name, rewards, random):
    judged = judged_of(rewards, random)
    alone = [ALL[name](take(judged, [prompt])) for prompt in range(len(rewards))]
    close(torch.cat(alone), ALL[name](judged))


@pytest.mark.parametrize("name", sorted(set(ALL) - {"opo", "reinforce_pp", "remax"}))
@PROPERTY
@given(rewards=binary_or_none, random=st.randoms(use_true_random=False))
def test_advantages_of_a_group_sum_to_0(name, rewards, random):
    advantages = ALL[name](judged_of(rewards, random))
    close(advantages.sum(1), torch.zeros(len(rewards), dtype=torch.float64))


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline", "gdpo"])
@PROPERTY
@given(rewards=binary_or_none, random=st.randoms(use_true_random=False))
def test_the_batch_has_mean_0_and_std_1(name, rewards, random):
    advantages = ALL[name](judged_of(rewards, random), std_floor=1e-12)
    assume((advantages != 0).any())
    count = len(compared(rewards))
    assert advantages.sum().item() == pytest.approx(0, abs=1e-6)
    assert advantages.square().sum().item() / count == pytest.approx(1, rel=1e-4)


@every
@PROPERTY
@given(rewards=binary_or_none, random=st.randoms(use_true_random=False))
def test_the_better_sample_of_a_group_never_has_less(name, rewards, random):
    # One single reward, and lengths and greedy answers at random.
    lengths = [[random.randint(1, 30) for _ in row] for row in rewards]
    judged = make_judged(rewards, lengths=lengths, greedy=[random.choice([0.0, 1.0]) for _ in rewards])
    for row, advantages in zip(rewards, ALL[name](judged).tolist(), strict=True):
        pairs = [(r, a) for r, a in zip(row, advantages, strict=True) if r is not None]
        right, wrong = [a for r, a in pairs if r == 1], [a for r, a in pairs if r == 0]
        if right and wrong and len(known(row)) >= 2:
            assert min(right) >= max(wrong)


@every
@pytest.mark.parametrize("rewards", [[LARGEST, 0.0], [1e-300, 0.0], [5e-324, 0.0], [1.0, 1.0 - 2**-53], [LARGEST] * 2])
def test_extreme_rewards_give_finite_advantages(name, rewards):
    advantages = ALL[name](make_judged([rewards, [0.0, 0.0]], greedy=[0.0, 0.0]))
    assert torch.isfinite(advantages).all()


@pytest.mark.parametrize("name", WITH_FLOOR)
@pytest.mark.parametrize("floor", [0.0, -1e-4, math.nan, math.inf])
def test_a_floor_that_is_none_is_refused(name, floor):
    with pytest.raises(ValueError, match="expected a finite std_floor > 0, but got"):
        ALL[name](make_judged([[0.0, 1.0]]), std_floor=floor)

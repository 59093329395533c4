import copy
import math
import pickle
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.metrics import RatioStats

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
log_ratios = st.lists(st.floats(-2, 2, width=32), min_size=0, max_size=20)


def stats_of(*parts):
    stats = RatioStats()
    for part in parts:
        stats.update(torch.as_tensor(part, dtype=torch.float32))
    return stats


def computed(stats):
    return {name: value.item() for name, value in stats.compute().items()}


def oracle(values):
    ratios = [math.exp(v) for v in values]
    return {
        "mean": statistics.fmean(ratios),
        "std": statistics.pstdev(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "count": float(len(ratios)),
    }


def spread_sample(spread, n=4096):
    return torch.randn(n, generator=torch.Generator().manual_seed(5)) * spread


def test_golden_numbers():
    # Ratios 1/2, 1, 3: mean 1.5, squared deviations 1 + 0.25 + 2.25, variance 3.5 / 3.
    stats = stats_of([math.log(0.5), 0.0, math.log(3.0)])
    expected = {"mean": 1.5, "std": math.sqrt(3.5 / 3), "min": 0.5, "max": 3.0, "count": 3.0}
    assert computed(stats) == pytest.approx(expected, rel=1e-6)
    assert {v.dtype for v in stats.compute().values()} == {torch.float64}


@pytest.mark.parametrize("spread", [1e-6, 1e-5, 1e-4])
def test_small_spreads_are_recovered_where_float32_sums_fail(spread):
    sample = spread_sample(spread)
    expected = oracle(sample.tolist())
    assert expected["std"] == pytest.approx(spread, rel=0.05)
    got = computed(stats_of(*sample.split(100)))
    assert got["std"] == pytest.approx(expected["std"], rel=1e-2)
    # In fact far better, and so are the others: they are deviations from 1.
    assert got["std"] == pytest.approx(expected["std"], rel=1e-6)
    for name in ("mean", "min", "max"):
        assert got[name] - 1 == pytest.approx(expected[name] - 1, rel=1e-6, abs=1e-15)
    # What sums of float32 ratios and their squares would say.
    ratio = sample.exp()
    variance = (ratio.square().sum() / len(ratio) - (ratio.sum() / len(ratio)) ** 2).item()
    naive = math.sqrt(variance) if variance > 0 else 0.0
    assert abs(naive - expected["std"]) > 0.01 * expected["std"]


@PROPERTY
@given(st.lists(log_ratios, min_size=1, max_size=5).filter(any))
def test_updates_merge_into_one(parts):
    whole = [v for part in parts for v in part]
    merged, once = computed(stats_of(*parts)), computed(stats_of(whole))
    assert merged == pytest.approx(once, rel=1e-9, abs=1e-12)
    assert merged == pytest.approx(oracle(whole), rel=1e-9, abs=1e-7)


def test_any_shape_and_gradient():
    values = torch.tensor([[0.1, -0.2], [0.3, 0.0]], requires_grad=True)
    stats = RatioStats()
    stats.update(values)
    assert computed(stats) == pytest.approx(oracle(values.flatten().tolist()), rel=1e-9)
    assert not stats.moments.requires_grad


@pytest.mark.parametrize("updates", [[], [[]], [[], []]])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_tokens_everything_is_nan(updates):
    got = computed(stats_of(*updates))
    assert got.pop("count") == 0.0
    assert set(got) == {"mean", "std", "min", "max"}
    assert all(math.isnan(v) for v in got.values())


def test_one_token_has_no_spread():
    assert computed(stats_of([0.0])) == {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0, "count": 1.0}


def test_states_survive_copies():
    stats = stats_of([0.1, 0.2, -0.4])
    before = computed(stats)
    twin, thawed = copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))
    twin.update(torch.tensor([1.0]))
    thawed.update(torch.tensor([1.0]))
    assert computed(stats) == before
    expected = oracle([0.1, 0.2, -0.4, 1.0])
    assert computed(twin) == pytest.approx(expected, rel=1e-6)
    assert computed(thawed) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_and_starts_anew():
    stats = stats_of([5.0, -5.0])
    stats.reset()
    assert computed(stats)["count"] == 0.0
    stats.update(torch.tensor([0.1, -0.1]))
    assert computed(stats) == pytest.approx(oracle([0.1, -0.1]), rel=1e-6)
    # The default is a copy: what was added after one reset is gone after the next.
    stats.reset()
    stats.update(torch.tensor([0.3]))
    assert computed(stats) == pytest.approx(oracle([0.3]), abs=1e-7)


def test_a_copy_of_a_reset_metric_works():
    stats = stats_of([0.5])
    stats.reset()
    twin = copy.deepcopy(stats)
    twin.update(torch.tensor([0.1]))
    assert computed(twin) == pytest.approx(oracle([0.1]), abs=1e-7)


def test_gathered_states_of_two_processes_merge():
    # A reduction of None leaves the gathered states stacked, one line a process.
    sample = spread_sample(1e-5)
    one, other = stats_of(sample[:1000]), stats_of(sample[1000:] + 0.01)
    both = RatioStats()
    both.update(torch.zeros(1))
    both.moments = torch.stack([one.moments, other.moments])
    expected = oracle([*sample[:1000].tolist(), *(sample[1000:] + 0.01).tolist()])
    assert computed(both) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1])
def test_synchronisation_by_torchmetrics_merges_processes(rank):
    sample = spread_sample(1e-5).split([1000, 3096])
    # One process may have no token at all.
    states = [stats_of(sample[0]).moments, stats_of(sample[1]).moments, RatioStats().moments]

    def gather(state, group=None):
        assert torch.equal(state, states[rank])
        return states

    stats = RatioStats(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    stats.update(sample[rank])
    expected = oracle(torch.cat(sample).tolist())
    assert computed(stats)["count"] == 4096
    assert computed(stats)["std"] == pytest.approx(expected["std"], rel=1e-6)
    # Afterwards the process has its own state back.
    assert torch.equal(stats.moments, states[rank])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_the_module_does_not_cost_precision(dtype):
    # Lightning's bf16-true converts the whole module before training.
    stats = torch.nn.ModuleDict({"stats": RatioStats()}).to(dtype)["stats"]
    sample = spread_sample(1e-5)
    for part in sample.split(500):
        stats.update(part)
    assert computed(stats)["std"] == pytest.approx(oracle(sample.tolist())["std"], rel=1e-6)
    stats.reset()
    stats.update(sample)
    assert computed(stats)["std"] == pytest.approx(oracle(sample.tolist())["std"], rel=1e-6)

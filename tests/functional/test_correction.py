import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.correction import CORRECTIONS, COVERS_TRUNCATION, Correction

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
BOUNDS = {
    "tis_token": {"cap": 2.0},
    "tis_sequence": {"cap": 3.0},
    "mis_token": {"low": 0.5, "high": 2.0},
    "mis_sequence": {"low": 0.4, "high": 3.0},
    "geometric_mask": {"low": 0.8, "high": 1.25},
    "reject_k1": {"threshold": 0.1},
    "reject_k3": {"threshold": 0.05},
}
token = st.tuples(
    st.floats(-2, 2),  # log-ratio
    st.one_of(st.just(0.0), st.floats(0.001, 1)),  # weight
    st.integers(0, 4),  # sequence
)
tokens = st.lists(token, min_size=1, max_size=20)
every = pytest.mark.parametrize("name", CORRECTIONS)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def correct(name, log_ratios, weights=None, sequences=None, **bounds):
    weights = [1.0] * len(log_ratios) if weights is None else weights
    sequences = [0] * len(log_ratios) if sequences is None else sequences
    log_ratios = f64(log_ratios) if isinstance(log_ratios, list) else log_ratios
    return CORRECTIONS[name](
        log_ratios, f64(weights), torch.tensor(sequences, dtype=torch.int64), **(bounds or BOUNDS[name])
    )


def ratios(values):
    return [math.log(value) for value in values]


def assert_is(correction, weight, dropped, truncated):
    assert correction.weight.tolist() == pytest.approx(weight, rel=1e-14, abs=1e-15)
    assert correction.dropped.tolist() == [bool(d) for d in dropped]
    assert correction.truncated.tolist() == [bool(t) for t in truncated]


# Ratios of two sequences: 4, 1/2, 5/4 (product 5/2) and 1/4, 1 (product 1/4).
RATIOS, SEQUENCES = [4, 0.5, 1.25, 0.25, 1.0], [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "bounds", "weight", "dropped", "truncated"),
    [
        ("tis_token", {}, [2, 0.5, 1.25, 0.25, 1], [0] * 5, [1, 0, 0, 0, 0]),
        ("tis_token", {"cap": 4.5}, [4, 0.5, 1.25, 0.25, 1], [0] * 5, [0] * 5),
        ("tis_sequence", {}, [2, 2, 2, 0.25, 0.25], [0] * 5, [1, 1, 1, 0, 0]),
        ("tis_sequence", {"cap": 3.0}, [2.5, 2.5, 2.5, 0.25, 0.25], [0] * 5, [0] * 5),
        ("mis_token", {}, [0, 0.5, 1.25, 0, 1], [1, 0, 0, 1, 0], [0] * 5),
        ("mis_token", {"low": 0.0, "high": 5.0}, [4, 0.5, 1.25, 0.25, 1], [0] * 5, [0] * 5),
        ("mis_sequence", {}, [0] * 5, [1] * 5, [0] * 5),
        ("mis_sequence", {"low": 0.2, "high": 2.0}, [0, 0, 0, 0.25, 0.25], [1, 1, 1, 0, 0], [0] * 5),
        # Geometric means: 2.5^(1/3) = 1.357 and 0.25^(1/2) = 0.5.
        ("geometric_mask", {"low": 0.6, "high": 1.4}, [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0] * 5),
        ("geometric_mask", {"low": 0.4, "high": 1.3}, [0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0] * 5),
        # Mean k1: -ln(2.5) / 3 = -0.305 and ln(4) / 2 = 0.693.
        ("reject_k1", {"threshold": 0.69}, [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0] * 5),
        ("reject_k1", {"threshold": 0.70}, [1] * 5, [0] * 5, [0] * 5),
        # Mean k3: (3 - ln 4 - 1/2 + ln 2 + 1/4 - ln 1.25) / 3 = 0.6112 and (-3/4 + ln 4) / 2 = 0.3181.
        ("reject_k3", {"threshold": 0.4}, [0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0] * 5),
        ("reject_k3", {"threshold": 0.611}, [0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0] * 5),
        ("reject_k3", {"threshold": 0.612}, [1] * 5, [0] * 5, [0] * 5),
        ("reject_k3", {"threshold": 0.318}, [0] * 5, [1] * 5, [0] * 5),
    ],
)
def test_golden_numbers(name, bounds, weight, dropped, truncated):
    sequences = torch.tensor(SEQUENCES)
    assert_is(CORRECTIONS[name](f64(ratios(RATIOS)), torch.ones(5), sequences, **bounds), weight, dropped, truncated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_belong_to_what_stays(dtype):
    at, one, sequence = torch.tensor([math.log(0.5), math.log(2)], dtype=dtype), torch.ones(2), torch.arange(2)
    for name, bounds in {
        "tis_token": {"cap": 2.0},
        "mis_token": {"low": 0.5, "high": 2.0},
        "mis_sequence": {"low": 0.5, "high": 2.0},
        "geometric_mask": {"low": 0.5, "high": 2.0},
        "reject_k1": {"threshold": -float(at[0])},
    }.items():
        correction = CORRECTIONS[name](at, one, sequence, **bounds)
        assert not (correction.dropped | correction.truncated).any(), name
        assert correction.weight.dtype == dtype


def oracle(name, values, bounds):
    """Weight, dropped and truncated of each token, by loops."""
    result = []
    for log_ratio, weight, sequence in values:
        if weight == 0:
            result.append((1.0, False, False))
            continue
        of_sequence = [r for r, w, s in values if s == sequence and w != 0]
        product = math.exp(math.fsum(of_sequence))
        mean = math.fsum(of_sequence) / len(of_sequence)
        k3 = math.fsum(math.exp(r) - 1 - r for r in of_sequence) / len(of_sequence)
        if name.startswith("tis"):
            ratio = math.exp(log_ratio) if name == "tis_token" else product
            result.append((min(ratio, bounds["cap"]), False, ratio > bounds["cap"]))
        elif name.startswith("mis"):
            ratio = math.exp(log_ratio) if name == "mis_token" else product
            dropped = not bounds["low"] <= ratio <= bounds["high"]
            result.append((0.0 if dropped else ratio, dropped, False))
        else:
            dropped = {
                "geometric_mask": lambda m=mean: not bounds["low"] <= math.exp(m) <= bounds["high"],
                "reject_k1": lambda m=mean: -m > bounds["threshold"],
                "reject_k3": lambda k=k3: k > bounds["threshold"],
            }[name]()
            result.append((float(not dropped), dropped, False))
    return result


def columns(values):
    return [list(column) for column in zip(*values, strict=True)]


@every
@PROPERTY
@given(values=tokens)
def test_equals_the_oracle(name, values):
    assert_is(correct(name, *columns(values)), *columns(oracle(name, values, BOUNDS[name])))


@every
@PROPERTY
@given(values=tokens, random=st.randoms(use_true_random=False))
def test_order_does_not_matter(name, values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    one, other = correct(name, *columns(values)), correct(name, *columns([values[i] for i in order]))
    torch.testing.assert_close(other.weight, one.weight[order], rtol=1e-13, atol=0)
    assert torch.equal(other.dropped, one.dropped[order])
    assert torch.equal(other.truncated, one.truncated[order])


@every
@PROPERTY
@given(values=tokens)
def test_batches_of_whole_sequences_give_the_same(name, values):
    whole = correct(name, *columns(values))
    for is_part in (lambda s: s < 2, lambda s: s >= 2):
        places = [i for i, (*_, s) in enumerate(values) if is_part(s)]
        if places:
            part = correct(name, *columns([values[i] for i in places]))
            torch.testing.assert_close(part.weight, whole.weight[places], rtol=1e-13, atol=0)
            assert torch.equal(part.dropped, whole.dropped[places])


@every
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e300])
def test_tokens_of_weight_0_never_matter(name, junk):
    kept = correct(name, [0.3, -0.2, 1.5], [1.0, 0.5, 1.0], [0, 0, 1])
    # Sequence 2 has no token that counts.
    more = correct(name, [junk, 0.3, -0.2, junk, 1.5, junk], [0, 1.0, 0.5, 0, 1.0, 0], [0, 0, 0, 1, 1, 2])
    assert torch.equal(more.weight[[1, 2, 4]], kept.weight)
    assert torch.equal(more.dropped[[1, 2, 4]], kept.dropped)
    assert torch.equal(more.truncated[[1, 2, 4]], kept.truncated)
    assert more.weight[[0, 3, 5]].tolist() == [1, 1, 1]
    assert not (more.dropped | more.truncated)[[0, 3, 5]].any()


@every
def test_equal_policies_change_nothing(name):
    assert_is(correct(name, [0.0] * 4, None, [0, 1, 1, 0]), [1] * 4, [0] * 4, [0] * 4)


@every
def test_all_weights_0_and_one_token_and_none(name):
    assert_is(correct(name, [math.nan, 5.0], [0.0, 0.0]), [1, 1], [0, 0], [0, 0])
    assert correct(name, [0.01]).weight.tolist() == pytest.approx([1], abs=0.011)
    assert correct(name, []).weight.shape == (0,)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_ratio", [-math.inf, -3e38, -1000.0, -50.0, 50.0, 1000.0, 3e38])
def test_extreme_ratios_stay_finite(name, dtype, log_ratio):
    # With itself twice, the sum too leaves what float32 can hold.
    extreme = torch.tensor([log_ratio, log_ratio, 0.0], dtype=dtype)
    correction = correct(name, extreme, None, [0, 0, 1])
    assert correction.weight.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.isfinite(correction.weight).all()
    assert correction.weight[2] == 1
    if name.startswith("tis"):
        expected = BOUNDS[name]["cap"] if log_ratio > 0 else 0
        assert correction.weight[:2].tolist() == pytest.approx([expected] * 2, abs=1e-20)
        assert correction.truncated.tolist() == [log_ratio > 0] * 2 + [False]
    else:
        # k1 alone looks at one direction.
        expected = not (name == "reject_k1" and log_ratio > 0)
        assert correction.dropped.tolist() == [expected, expected, False]


@every
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, r"expected log-ratios below inf, but got log_ratio_N\[1\] = nan"),
        # A behaviour log-probability of minus infinity.
        (math.inf, r"got log_ratio_N\[1\] = inf: the engine cannot have sampled a token that it gives probability 0"),
    ],
)
def test_broken_log_ratios_are_named(name, bad, message):
    with pytest.raises(ValueError, match=message):
        correct(name, [0.1, bad, bad])


@every
def test_shapes_that_differ_are_named(name):
    for shapes in (((3,), (1,), (3,)), ((3,), (3,), (2,)), ((1, 3), (1, 3), (1, 3))):
        log_ratio, weight, sequence = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=r"expected three tensors of one shape \[N\], but got shapes \[\("):
            CORRECTIONS[name](log_ratio, weight, sequence.long(), **BOUNDS[name])


@pytest.mark.parametrize(
    ("name", "bounds", "message"),
    [
        ("tis_token", {"cap": 0.0}, "expected a finite cap > 0, but got 0.0"),
        ("tis_sequence", {"cap": math.inf}, "expected a finite cap > 0, but got inf"),
        ("tis_token", {"cap": math.nan}, "expected a finite cap > 0, but got nan"),
        ("mis_token", {"low": -0.1, "high": 2.0}, "expected 0 <= low < high, but got low -0.1 and high 2.0"),
        ("mis_sequence", {"low": 2.0, "high": 2.0}, "expected 0 <= low < high, but got low 2.0 and high 2.0"),
        ("geometric_mask", {"low": math.nan, "high": 2.0}, "expected 0 <= low < high, but got low nan"),
        ("geometric_mask", {"low": 0.5, "high": math.inf}, "expected a finite high > 0, but got inf"),
        ("reject_k1", {"threshold": -0.1}, "expected a finite threshold >= 0, but got -0.1"),
        ("reject_k3", {"threshold": math.nan}, "expected a finite threshold >= 0, but got nan"),
    ],
)
def test_wrong_bounds_are_named(name, bounds, message):
    with pytest.raises(ValueError, match=message):
        correct(name, [0.0], **bounds)


@every
def test_weights_carry_no_gradient(name):
    log_ratio = f64([0.2, -0.3]).requires_grad_()
    correction = correct(name, log_ratio)
    assert isinstance(correction, Correction)
    assert not correction.weight.requires_grad
    # At equal policies what is left is the surrogate's own gradient.
    logprobs = f64([-1.0, -2.0]).requires_grad_()
    loss = -(correct(name, [0.0, 0.0]).weight * logprobs * f64([0.5, -2.0])).sum()
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-0.5, 2.0]


def test_corrections_by_name():
    assert {function.__name__: function for function in CORRECTIONS.values()} == CORRECTIONS
    assert set(BOUNDS) == set(CORRECTIONS)
    assert {"tis_token", "tis_sequence", "mis_token", "mis_sequence"} == COVERS_TRUNCATION


PROXIMAL = [0.4, 0.3, 0.15, 0.1, 0.05]
KEPT = {"top-p 0.8": 3, "top-k 2": 2, "top-k 1": 1, "all": 5}


def expectation(name, kept, value, **bounds):
    """What the correction makes of the mean of a value, over one token of an engine that keeps the likeliest."""
    mass = math.fsum(PROXIMAL[:kept])
    behaviour = [p / mass for p in PROXIMAL[:kept]]
    log_ratios = [math.log(p / b) for p, b in zip(PROXIMAL[:kept], behaviour, strict=True)]
    weight = correct(name, log_ratios, None, list(range(kept)), **bounds).weight.tolist()
    return math.fsum(b * w * v for b, w, v in zip(behaviour, weight, value[:kept], strict=True))


@every
@pytest.mark.parametrize("truncation", KEPT)
def test_which_corrections_undo_truncated_sampling_on_the_kept_tokens(name, truncation):
    kept, value = KEPT[truncation], [1.0, -2.0, 0.5, 3.0, -1.0]
    wide = {"threshold": 10.0} if name.startswith("reject") else {"low": 0.01, "high": 100.0}
    computed = expectation(name, kept, value, **({"cap": 2.0} if name.startswith("tis") else wide))
    expected = math.fsum(p * v for p, v in zip(PROXIMAL[:kept], value[:kept], strict=True))
    assert (computed == pytest.approx(expected, rel=1e-12)) == (name in COVERS_TRUNCATION or truncation == "all")
    # The tokens that are never sampled are missing from it all the same.
    if truncation != "all":
        assert expected != pytest.approx(math.fsum(p * v for p, v in zip(PROXIMAL, value, strict=True)), rel=0.1)


def test_masks_drop_sound_tokens_where_truncation_keeps_less_than_their_lower_bound():
    # Top-k of 1 keeps 0.4 of the mass, below 0.5; top-p of 0.8 keeps 0.85.
    assert expectation("mis_token", 1, [1.0] * 5, low=0.5, high=2.0) == 0
    assert expectation("mis_token", 3, [1.0] * 5, low=0.5, high=2.0) == pytest.approx(0.85, rel=1e-14)
    # A product of five such tokens is 0.44: a long sequence is dropped, each token alone is not.
    long = ratios([0.85] * 5)
    assert correct("mis_sequence", long, low=0.5, high=2.0).dropped.all()
    assert not correct("mis_token", long, low=0.5, high=2.0).dropped.any()

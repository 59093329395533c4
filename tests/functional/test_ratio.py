import math

import pytest
import torch
from functional.terms_maker import PROPERTY, Token, batches, column, near
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.ratio import RATIO_LEVELS, sequence, sequence_product, sequence_token, token

levels = pytest.mark.parametrize("level", RATIO_LEVELS.values(), ids=RATIO_LEVELS)


def inputs(tokens, dtype=torch.float64):
    old = [t.logprob - t.log_ratio for t in tokens]
    return (
        column(tokens, "logprob", dtype).requires_grad_(),
        torch.tensor(old, dtype=dtype),
        column(tokens, "weight", dtype),
        column(tokens, "sequence", torch.int64),
    )


def gradient(level, arguments, upstream):
    result = level(*arguments)
    return torch.autograd.grad((result * upstream).sum(), arguments[0])[0]


def oracle(name, tokens, upstream):
    """Log-ratios and the gradient of ``sum(upstream * log_ratio)``, by loops."""
    values, grads = [0.0] * len(tokens), [0.0] * len(tokens)
    for i, t in enumerate(tokens):
        if t.weight == 0:
            continue
        mates = [k for k, o in enumerate(tokens) if o.sequence == t.sequence and o.weight != 0]
        share = {"token": 1, "sequence_product": 1}.get(name, 1 / len(mates))
        of = [i] if name == "token" else mates
        values[i] = share * math.fsum(tokens[k].logprob - (tokens[k].logprob - tokens[k].log_ratio) for k in of)
        if name == "sequence_token":
            grads[i] += upstream[i]
        else:
            for k in of:
                grads[k] += share * upstream[i]
    return values, grads


# Two sequences: log-ratios 0.2, 0.4 (and 9 at weight 0) and -0.3; the gradients of upstream 1, 10, 100, 1000.
THREE = [
    Token(log_ratio=0.2),
    Token(log_ratio=0.4),
    Token(log_ratio=9.0, weight=0.0),
    Token(log_ratio=-0.3, sequence=1),
]


@pytest.mark.parametrize(
    ("level", "values", "grads"),
    [
        (token, [0.2, 0.4, 0.0, -0.3], [1.0, 10.0, 0.0, 1000.0]),
        (sequence, [0.3, 0.3, 0.0, -0.3], [5.5, 5.5, 0.0, 1000.0]),  # mean of 0.2 and 0.4; (1 + 10) / 2
        (sequence_token, [0.3, 0.3, 0.0, -0.3], [1.0, 10.0, 0.0, 1000.0]),
        (sequence_product, [0.6, 0.6, 0.0, -0.3], [11.0, 11.0, 0.0, 1000.0]),  # sum; 1 + 10
    ],
)
def test_golden_numbers(level, values, grads):
    arguments = inputs(THREE)
    assert level(*arguments).tolist() == near(values)
    assert gradient(level, arguments, torch.tensor([1.0, 10.0, 100.0, 1000.0])).tolist() == near(grads)


@pytest.mark.parametrize("name", RATIO_LEVELS)
@PROPERTY
@given(batches(), st.randoms(use_true_random=False))
def test_equals_the_oracle(name, tokens, random):
    upstream = [random.uniform(-2, 2) for _ in tokens]
    values, grads = oracle(name, tokens, upstream)
    arguments = inputs(tokens)
    assert RATIO_LEVELS[name](*arguments).tolist() == near(values)
    assert gradient(RATIO_LEVELS[name], arguments, torch.tensor(upstream, dtype=torch.float64)).tolist() == near(grads)


@levels
@PROPERTY
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_tokens_does_not_matter(level, tokens, random):
    order = list(range(len(tokens)))
    random.shuffle(order)
    one, other = level(*inputs(tokens)).tolist(), level(*inputs([tokens[i] for i in order])).tolist()
    assert other == near([one[i] for i in order])


@levels
@PROPERTY
@given(batches())
def test_sequences_do_not_mix(level, tokens):
    whole = level(*inputs(tokens)).tolist()
    for s in {t.sequence for t in tokens}:
        alone = level(*inputs([t for t in tokens if t.sequence == s])).tolist()
        assert alone == near([v for v, t in zip(whole, tokens, strict=True) if t.sequence == s])


@levels
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_what_weight_zero_holds_does_not_matter(level, junk):
    clean = inputs(THREE)
    dirty = inputs(THREE)
    with torch.no_grad():
        dirty[0][2] = junk
        dirty[1][2] = junk
    assert torch.equal(level(*clean), level(*dirty))
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    got = gradient(level, dirty, upstream)
    assert torch.equal(got, gradient(level, clean, upstream))
    assert got[2].item() == 0


@levels
def test_all_weights_zero_and_no_tokens(level):
    arguments = inputs([Token(weight=0.0), Token(weight=0.0)])
    assert level(*arguments).tolist() == [0.0, 0.0]
    assert gradient(level, arguments, torch.ones(2)).tolist() == [0.0, 0.0]
    assert level(*inputs([])).shape == (0,)


@levels
def test_extreme_log_ratios_stay_exact(level):
    for extreme in (50.0, -50.0):
        got = level(*inputs([Token(-60.0, extreme)], torch.float32))
        assert got.tolist() == [extreme]


@levels
def test_impossible_tokens_have_ratio_zero_without_gradient(level):
    arguments = inputs([Token(), Token()])
    with torch.no_grad():
        arguments[0][1] = -math.inf
    ratio = level(*arguments).exp()
    assert ratio[1].item() == 0
    (got,) = torch.autograd.grad(ratio.sum(), arguments[0])
    assert got[1].item() == 0
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("name", ["token", "sequence", "sequence_product"])
def test_gradcheck(name):
    logprobs, *rest = inputs(THREE)
    assert torch.autograd.gradcheck(lambda p: RATIO_LEVELS[name](p, *rest), logprobs)


@PROPERTY
@given(batches(one_weight=True))
def test_sequence_token_learns_like_sequence_where_the_tokens_agree(tokens):
    upstream = column(tokens, "advantage")
    grads = []
    for level in (sequence, sequence_token):
        arguments = inputs(tokens)
        (got,) = torch.autograd.grad((level(*arguments).exp() * upstream).sum(), arguments[0])
        grads.append(got.tolist())
    assert grads[1] == near(grads[0])


@levels
def test_wrong_input_is_named(level):
    good = inputs(THREE)
    with pytest.raises(ValueError, match=r"expected tensors of one shape \[N\], but got shapes .*'weight': \(3,\)"):
        level(good[0], good[1], good[2][:3], good[3])
    with pytest.raises(ValueError, match=r"expected tensors of one shape \[N\]"):
        level(*(t[None] for t in good))
    with pytest.raises(ValueError, match="expected old logprobs without gradient, but they require grad"):
        level(good[0], good[0], *good[2:])
    old = good[1].clone()
    old[0] = -math.inf
    with pytest.raises(ValueError, match="expected finite old logprobs where the weight is not 0, but got 1 infinite"):
        level(good[0], old, *good[2:])

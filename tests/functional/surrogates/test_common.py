"""What every surrogate promises, at every ratio level that it takes."""

import dataclasses
import itertools
import math

import pytest
import torch
from functional.terms_maker import PROPERTY, Token, batches, level_terms, make_terms, near, total
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.ratio import RATIO_LEVELS
from grpo_lightning.functional.surrogates import SURROGATES, TOKEN_RATIO_ONLY

PAIRS = [(s, r) for s in SURROGATES for r in RATIO_LEVELS if r == "token" or SURROGATES[s] not in TOKEN_RATIO_ONLY]
every = pytest.mark.parametrize(("surrogate", "level"), PAIRS)
# Their ratio is a constant weight, if they have one: the gradient is that of the log-probability.
OF_LOGPROBS = ("reinforce", "cispo", "vespo")
# Two sequences; those of weight 0 are dirtied below.
TOKENS = [
    Token(-1.0, 0.3, 1.5, 0.5, 0, True),
    Token(-2.0, -0.5, 1.5, 0.0, 0, True),
    Token(-0.5, 0.1, -0.7, 0.25, 1, False),
    Token(-3.0, -0.2, -0.7, 0.0, 1, False),
    Token(-3.0, -0.4, -0.7, 0.25, 1, True),
]


def run(surrogate, level, tokens, dtype=torch.float64):
    terms = level_terms(tokens, RATIO_LEVELS[level], dtype)
    result = SURROGATES[surrogate](terms)
    loss = total(terms, result)
    (gradient,) = torch.autograd.grad(loss, terms.logprobs)
    return loss.item(), gradient.tolist(), result


@every
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_what_weight_zero_holds_does_not_matter(surrogate, level, junk):
    loss, gradient, result = run(surrogate, level, TOKENS)
    dirty = [dataclasses.replace(t, logprob=junk, advantage=junk) if t.weight == 0 else t for t in TOKENS]
    dirty_loss, dirty_gradient, dirty_result = run(surrogate, level, dirty)
    assert (dirty_loss, dirty_gradient) == (loss, gradient)
    assert [dirty_gradient[1], dirty_gradient[3]] == [0.0, 0.0]
    assert torch.equal(dirty_result.loss, result.loss)
    for flags in (dirty_result.clipped_low, dirty_result.clipped_high):
        assert flags.tolist()[1::2] == [False, False]


@every
def test_weight_zero_need_not_be_cleaned_by_the_ratio_level(surrogate, level):
    junk = math.nan
    dirty = [
        dataclasses.replace(t, logprob=junk, log_ratio=junk, advantage=junk) if t.weight == 0 else t for t in TOKENS
    ]
    terms = make_terms(dirty)
    loss = total(terms, SURROGATES[surrogate](terms))
    grads = torch.autograd.grad(loss, [terms.logprobs, terms.log_ratio], materialize_grads=True)
    assert math.isfinite(loss.item())
    for gradient in grads:
        assert gradient.tolist()[1::2] == [0.0, 0.0]
        assert bool(gradient.isfinite().all())


@every
@PROPERTY
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_tokens_does_not_matter(surrogate, level, tokens, random):
    order = list(range(len(tokens)))
    random.shuffle(order)
    loss, gradient, _ = run(surrogate, level, tokens)
    other_loss, other_gradient, _ = run(surrogate, level, [tokens[i] for i in order])
    assert other_loss == near(loss)
    assert other_gradient == near([gradient[i] for i in order])


@every
@PROPERTY
@given(batches())
def test_micro_batches_of_whole_sequences_add_up(surrogate, level, tokens):
    loss, gradient, _ = run(surrogate, level, tokens)
    parts, grads = [], [0.0] * len(tokens)
    for even in (0, 1):
        indices = [i for i, t in enumerate(tokens) if t.sequence % 2 == even]
        part, part_gradient, _ = run(surrogate, level, [tokens[i] for i in indices])
        parts.append(part)
        for i, g in zip(indices, part_gradient, strict=True):
            grads[i] = g
    assert math.fsum(parts) == near(loss)
    assert grads == near(gradient)


@every
@PROPERTY
@given(batches(one_weight=True))
def test_ratio_one_gives_the_reinforce_gradient(surrogate, level, tokens):
    tokens = [dataclasses.replace(t, log_ratio=0.0, marked=t.marked and surrogate != "clip_cov") for t in tokens]
    _, gradient, result = run(surrogate, level, tokens)
    # Each token carries the ratio of all its sequence, so that each is counted once for each.
    times = [
        sum(o.sequence == t.sequence for o in tokens)
        if level == "sequence_product" and surrogate not in OF_LOGPROBS
        else 1
        for t in tokens
    ]
    assert gradient == near([-t.weight * t.advantage * n for t, n in zip(tokens, times, strict=True)])
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


@every
@PROPERTY
@given(batches())
def test_tokens_reported_as_clipped_are_those_without_gradient(surrogate, level, tokens):
    terms = make_terms(tokens)
    result = SURROGATES[surrogate](terms)
    (gradient,) = torch.autograd.grad(result.loss.sum(), terms.log_ratio, materialize_grads=True)
    clipped = result.clipped_low | result.clipped_high
    assert not gradient[clipped].any()
    assert not (result.clipped_low & result.clipped_high).any()
    if surrogate not in OF_LOGPROBS:
        hidden = (terms.weight == 0) | (terms.advantages == 0)
        if surrogate == "clip_cov":
            hidden |= terms.marked
        assert bool(((gradient != 0) | clipped | hidden | (surrogate == "kl_cov" and terms.marked)).all())


@every
def test_extreme_ratios_of_one_token_stay_finite_in_float32(surrogate, level):
    for log_ratio, advantage, marked in itertools.product((50.0, -50.0, 0.0), (1.0, -1.0, 0.0), (True, False)):
        token = Token(-55.0 if log_ratio < 0 else -0.01, log_ratio, advantage, 0.5, 0, marked)
        loss, gradient, result = run(surrogate, level, [token], torch.float32)
        assert math.isfinite(loss)
        assert math.isfinite(gradient[0])
        assert result.loss.dtype == torch.float32


@every
def test_ratios_beyond_float32_leave_no_nan_where_they_have_no_say(surrogate, level):
    # exp(100) is infinite in float32: good tokens are clipped, and those of advantage 0 do not count.
    tokens = [Token(-0.01, 100.0, advantage, 0.5, i, False) for i, advantage in enumerate((1.0, 0.0))]
    unbounded = surrogate == "kl_cov"
    loss, gradient, _ = run(surrogate, level, tokens[1:] if unbounded else tokens, torch.float32)
    assert math.isfinite(loss)
    assert all(map(math.isfinite, gradient))


@every
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_tokens_that_became_impossible_are_finite_or_refused(surrogate, level, advantage):
    terms = make_terms([Token(advantage=advantage), Token(advantage=advantage, marked=True)])
    logprobs = torch.tensor([-1.0, -math.inf], dtype=torch.float64, requires_grad=True)
    log_ratio = RATIO_LEVELS[level](logprobs, torch.full_like(logprobs, -1.0), terms.weight, terms.sequence)
    terms = dataclasses.replace(terms, logprobs=logprobs, log_ratio=log_ratio)
    if surrogate in (*OF_LOGPROBS, "kl_cov"):
        with pytest.raises(ValueError, match=r"expected finite log(probs|-ratios of marked tokens) .*, but got 1 inf"):
            SURROGATES[surrogate](dataclasses.replace(terms, log_ratio=logprobs + 1))
        return
    loss = total(terms, SURROGATES[surrogate](terms))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert math.isfinite(loss.item())
    assert bool(gradient.isfinite().all())
    assert gradient[1].item() == 0


@every
def test_all_weights_zero_and_no_tokens(surrogate, level):
    loss, gradient, _ = run(surrogate, level, [dataclasses.replace(t, weight=0.0) for t in TOKENS])
    assert (loss, gradient) == (0.0, [0.0] * len(TOKENS))
    loss, gradient, result = run(surrogate, level, [])
    assert (loss, gradient, result.loss.shape) == (0.0, [], (0,))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gradcheck(surrogate):
    # Away from the edges 0.8 and 1.2, 0.4 in log space, and a change of probability of 0.15.
    tokens = [
        Token(logprob, log_ratio, advantage, weight, sequence, marked)
        for sequence, advantage in enumerate((1.3, -0.7))
        for logprob, log_ratio, weight, marked in (
            (-0.2, 0.7, 0.1, False),
            (-1.0, -0.1, 0.2, True),
            (-2.0, 0.1, 0.3, False),
            (-0.5, -0.3, 0.0, False),
            (-1.9, -0.9, 0.4, False),
        )
    ]
    terms = make_terms(tokens)
    # The weight of CISPO is a constant; the others see the log-probability only in the ratio.
    name = "logprobs" if surrogate in OF_LOGPROBS else "log_ratio"

    def loss(values):
        replaced = dataclasses.replace(terms, **{name: values})
        return total(replaced, SURROGATES[surrogate](replaced))

    assert torch.autograd.gradcheck(loss, getattr(terms, name))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_wrong_shapes_are_named(surrogate):
    terms = make_terms(TOKENS)
    with pytest.raises(ValueError, match=r"expected tensors of one shape \[N\], but got shapes .*'marked': \(2,\)"):
        SURROGATES[surrogate](dataclasses.replace(terms, marked=terms.marked[:2]))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_advantages_get_no_gradient(surrogate):
    terms = make_terms(TOKENS)
    terms.advantages.requires_grad_()
    total(terms, SURROGATES[surrogate](terms)).backward()
    assert terms.advantages.grad is None

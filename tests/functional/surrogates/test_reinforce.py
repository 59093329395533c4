from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import given

from grpo_lightning.functional.surrogates import reinforce


def test_golden_numbers():
    # -A log p: 2 * 1.5 and -0.5 * 4, whatever the ratio.
    terms = make_terms([Token(-1.5, 7.0, 2.0, 0.1), Token(-4.0, -7.0, -0.5, 0.2)])
    result = reinforce(terms)
    assert result.loss.tolist() == [3.0, -2.0]
    assert gradients(terms, result) == [[-2.0, 0.5], [0.0, 0.0]]
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


@PROPERTY
@given(batches(one_advantage=False))
def test_equals_the_oracle(tokens):
    terms = make_terms(tokens)
    result = reinforce(terms)
    slopes = [-t.advantage if t.weight else 0.0 for t in tokens]
    assert result.loss.tolist() == near([s * t.logprob for s, t in zip(slopes, tokens, strict=True)])
    assert gradients(terms, result)[0] == near(slopes)

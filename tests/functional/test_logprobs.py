import math
import random

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo_lightning.functional.logprobs as logprobs_module
from grpo_lightning.functional import log_distributions, token_logprobs

TWO_LINES = 2 * 11 * 8
"""Bytes of two lines of float64 logits over the vocabulary of `problem`."""


def problem(n=7, h=5, v=11, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64) * scale
    head = torch.randn(v, h, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=generator)
    return hidden.to(dtype), head.to(dtype), targets


def oracle(hidden, head, targets, temperature):
    """What `token_logprobs` knows and the gradients of each log-probability, by loops over floats."""
    result = []
    for line, target in zip(hidden, targets, strict=True):
        logits = [math.fsum(a * b for a, b in zip(line, row, strict=True)) / temperature for row in head]
        top = max(logits)
        log_z = top + math.log(math.fsum(math.exp(z - top) for z in logits))
        logp = [z - log_z for z in logits]
        entropy = -math.fsum(math.exp(lp) * lp for lp in logp)
        wrt_hidden = [
            (head[target][j] - math.fsum(math.exp(lp) * row[j] for lp, row in zip(logp, head, strict=True)))
            / temperature
            for j in range(len(line))
        ]
        # d logp[target] / d head[v] = (1[v = target] - pi_v) * hidden / T
        wrt_head = [[((v == target) - math.exp(lp)) * x / temperature for x in line] for v, lp in enumerate(logp)]
        variance = math.fsum(math.exp(lp) * (-lp - entropy) ** 2 for lp in logp)
        above = math.fsum(math.exp(lp) for lp in logp if lp > logp[target])
        result.append((logp[target], entropy, variance, above, wrt_hidden, wrt_head))
    return result


def assert_equals(computed, expected):
    """All four outputs, against lines of the oracle."""
    for name, values, column in zip(computed._fields, computed, zip(*expected, strict=True), strict=False):
        assert values.tolist() == pytest.approx(list(column), rel=1e-11, abs=1e-13), name


def plain(hidden, head, targets, temperature):
    logp = torch.log_softmax((hidden @ head.T) / temperature, dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def test_golden_numbers():
    # Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    head = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    hidden = torch.ones(3, 1, dtype=torch.float64)
    logprobs, entropy, variance, above = token_logprobs(hidden, head, torch.tensor([0, 1, 2]))
    assert logprobs.tolist() == pytest.approx(
        [-2.0794415416798357, -1.3862943611198906, -0.4700036292457356], rel=1e-14
    )
    expected = math.log(8) / 8 + math.log(4) / 4 + math.log(8 / 5) * 5 / 8
    assert entropy.tolist() == pytest.approx([expected] * 3, rel=1e-14)
    squares = math.log(8) ** 2 / 8 + math.log(4) ** 2 / 4 + math.log(8 / 5) ** 2 * 5 / 8
    assert variance.tolist() == pytest.approx([squares - expected**2] * 3, rel=1e-13)
    assert variance[0].item() == pytest.approx(0.34856632892066, rel=1e-12)
    assert above.tolist() == pytest.approx([7 / 8, 5 / 8, 0], rel=1e-14)


@pytest.mark.parametrize("trainable", [False, True])
def test_no_mass_is_above_the_likeliest_and_equals_are_not_above_each_other(trainable):
    head = torch.tensor([[1.0], [1.0], [0.0], [0.0]], requires_grad=trainable)
    *_, variance, above = token_logprobs(torch.full((4, 1), 0.5), head, torch.arange(4))
    assert above[:2].tolist() == [0, 0]
    assert above[2:].tolist() == pytest.approx([1 / (1 + math.exp(-0.5))] * 2, rel=1e-6)
    # Two kinds of tokens, 0.5 nats apart.
    p = 1 / (1 + math.exp(-0.5))
    assert variance.tolist() == pytest.approx([p * (1 - p) / 4] * 4, rel=1e-5)


def test_golden_temperature():
    # Half the temperature squares the odds: 1, 4, 25 of 30. Twice the temperature takes their roots: 1 : 2 : 5.
    head = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    cold, *_ = token_logprobs(torch.ones(3, 1, dtype=torch.float64), head, torch.arange(3), temperature=0.5)
    assert cold.exp().tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30], rel=1e-14)
    warm, *_ = token_logprobs(torch.full((3, 1), 2.0, dtype=torch.float64), head, torch.arange(3), temperature=2.0)
    assert warm.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-14)


def test_uniform_distribution_has_entropy_log_v():
    _, entropy, variance, above = token_logprobs(torch.zeros(2, 3), torch.ones(50, 3), torch.tensor([0, 49]))
    assert entropy.tolist() == pytest.approx([math.log(50)] * 2, rel=1e-6)
    assert variance.tolist() == pytest.approx([0] * 2, abs=1e-5)
    assert above.tolist() == [0, 0]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
@pytest.mark.parametrize("chunk_bytes", [1, TWO_LINES, 10**6])
def test_equals_the_oracle(trainable, temperature, chunk_bytes):
    hidden, head, targets = problem()
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    computed = token_logprobs(hidden, head, targets, temperature=temperature, chunk_bytes=chunk_bytes)
    weight = [0.3, -1.0, 2.0, 0.0, 0.7, -0.2, 1.1]
    (torch.tensor(weight, dtype=torch.float64) * computed.logprobs).sum().backward()
    expected = oracle(hidden.tolist(), head.tolist(), targets.tolist(), temperature)
    assert_equals(computed, expected)
    for n, (*_, wrt_hidden, _) in enumerate(expected):
        assert hidden.grad[n].tolist() == pytest.approx([weight[n] * g for g in wrt_hidden], rel=1e-10, abs=1e-14)
    if trainable:
        for v, j in ((v, j) for v in range(head.shape[0]) for j in range(head.shape[1])):
            total = math.fsum(w * e[-1][v][j] for w, e in zip(weight, expected, strict=True))
            assert head.grad[v, j].item() == pytest.approx(total, rel=1e-10, abs=1e-14)
    else:
        assert head.grad is None


BANNED = (2, 0, 10)


def without_banned():
    """`problem` with targets that can be sampled, and the same over the vocabulary without the banned tokens."""
    hidden, head, targets = problem()
    kept = [v for v in range(len(head)) if v not in BANNED]
    places = targets % len(kept)
    return hidden, head, torch.tensor(kept)[places], kept, places


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, TWO_LINES, 10**6])
def test_banned_tokens_are_not_in_the_vocabulary(trainable, chunk_bytes):
    hidden, head, targets, kept, places = without_banned()
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    computed = token_logprobs(hidden, head, targets, temperature=0.7, banned_token_ids=BANNED, chunk_bytes=chunk_bytes)
    computed.logprobs.sum().backward()
    expected = oracle(hidden.tolist(), head[kept].tolist(), places.tolist(), 0.7)
    assert_equals(computed, expected)
    for line, (*_, wrt_hidden, _) in zip(hidden.grad, expected, strict=True):
        assert line.tolist() == pytest.approx(wrt_hidden, rel=1e-10, abs=1e-14)
    if trainable:
        wrt_head = torch.tensor([e[-1] for e in expected], dtype=torch.float64).sum(0)
        torch.testing.assert_close(head.grad[kept], wrt_head, rtol=1e-10, atol=1e-14)
        assert not head.grad[list(BANNED)].any()


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_with_banned_tokens(trainable):
    hidden, head, targets, _, _ = without_banned()

    def logprobs(hidden, head):
        return token_logprobs(hidden, head, targets, banned_token_ids=BANNED, chunk_bytes=TWO_LINES)[0]

    inputs = (hidden.requires_grad_(), head.requires_grad_(trainable))
    assert torch.autograd.gradcheck(logprobs, inputs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banned_tokens_in_low_precision(dtype):
    hidden, head, targets, kept, places = without_banned()
    computed = token_logprobs(
        hidden.to(dtype).requires_grad_(), head.to(dtype), targets, temperature=0.01, banned_token_ids=BANNED
    )
    expected = token_logprobs(hidden.to(dtype), head.to(dtype)[kept], places, temperature=0.01)
    torch.testing.assert_close(tuple(t.detach() for t in computed), tuple(expected))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_equals_the_full_log_softmax(trainable, dtype, tolerance):
    hidden, head, targets = problem(n=53, h=16, v=301, seed=1, dtype=dtype, scale=0.5)
    weight = torch.randn(53, generator=torch.Generator().manual_seed(2), dtype=dtype)
    results = []
    for function in (plain, token_logprobs):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(trainable)
        # Seven lines a chunk: eight chunks, the last one shorter.
        kwargs = {"chunk_bytes": 7 * 301 * h.element_size()} if function is token_logprobs else {}
        logprobs, entropy, *_ = function(h, w, targets, temperature=0.7, **kwargs)
        (weight * logprobs).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), h.grad, w.grad if trainable else torch.zeros(())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradcheck(trainable):
    hidden, head, targets = problem(n=5, h=2, v=4)
    hidden.requires_grad_()
    head.requires_grad_(trainable)

    def function(h, w):
        return token_logprobs(h, w, targets, temperature=0.7, chunk_bytes=2 * 4 * 8)[0]

    assert torch.autograd.gradcheck(function, (hidden, head))


def test_gradcheck_of_the_head_alone():
    hidden, head, targets = problem(n=5, h=2, v=4)
    head.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: token_logprobs(hidden, w, targets, chunk_bytes=2 * 4 * 8)[0], head)


@pytest.mark.parametrize("trainable", [False, True])
def test_only_logprobs_carry_a_gradient(trainable):
    hidden, head, targets = problem()
    logprobs, *others = token_logprobs(hidden.requires_grad_(), head.requires_grad_(trainable), targets)
    assert logprobs.requires_grad
    assert not any(values.requires_grad for values in others)


def entropy_oracle(line, head, temperature):
    """Gradients of an entropy, by loops over floats: `d H = -sum_v p_v (log p_v + H) d z_v`."""
    logits = [math.fsum(a * b for a, b in zip(line, row, strict=True)) / temperature for row in head]
    log_z = max(logits) + math.log(math.fsum(math.exp(z - max(logits)) for z in logits))
    logp = [z - log_z for z in logits]
    entropy = -math.fsum(math.exp(lp) * lp for lp in logp)
    slope = [-math.exp(lp) * (lp + entropy) for lp in logp]
    wrt_hidden = [
        math.fsum(s * row[j] for s, row in zip(slope, head, strict=True)) / temperature for j in range(len(line))
    ]
    return wrt_hidden, [[s * x / temperature for x in line] for s in slope]


WEIGHT = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7, -0.2, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
@pytest.mark.parametrize("chunk_bytes", [1, TWO_LINES, 10**6])
def test_entropy_gradient_equals_the_oracle(trainable, temperature, chunk_bytes):
    hidden, head, targets = problem()
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    settings = {"temperature": temperature, "chunk_bytes": chunk_bytes}
    computed = token_logprobs(hidden, head, targets, entropy_gradient=True, **settings)
    (WEIGHT * computed.entropy).sum().backward()
    expected = [entropy_oracle(line, head.tolist(), temperature) for line in hidden.tolist()]
    for line, weight, (wrt_hidden, _) in zip(hidden.grad, WEIGHT.tolist(), expected, strict=True):
        assert line.tolist() == pytest.approx([weight * g for g in wrt_hidden], rel=1e-10, abs=1e-14)
    if trainable:
        wrt_head = torch.tensor([e[1] for e in expected], dtype=torch.float64)
        torch.testing.assert_close(head.grad, (WEIGHT[:, None, None] * wrt_head).sum(0), rtol=1e-10, atol=1e-13)
    # No value depends on whether its gradient is wanted.
    for with_it, without in zip(computed, token_logprobs(hidden, head, targets, **settings), strict=True):
        assert torch.equal(with_it, without)


@pytest.mark.parametrize("trainable", [False, True])
def test_golden_entropy_gradient(trainable):
    # Logits a and 0: dH / da = -a p (1 - p); at a = ln 3 p is 3/4, at 0 the entropy is at its maximum.
    hidden = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=trainable)
    token_logprobs(hidden, head, torch.tensor([0, 0]), entropy_gradient=True).entropy.sum().backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([-math.log(3) * 3 / 16, 0.0], rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("banned", [(), BANNED])
def test_gradcheck_of_logprobs_and_entropy_together(trainable, banned):
    hidden, head, targets, _, _ = without_banned()

    def function(hidden, head):
        settings = {"temperature": 0.7, "banned_token_ids": banned, "chunk_bytes": TWO_LINES}
        return token_logprobs(hidden, head, targets, entropy_gradient=True, **settings)[:2]

    inputs = (hidden.requires_grad_(), head.requires_grad_(trainable))
    assert torch.autograd.gradcheck(function, inputs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_both_gradients_equal_those_of_the_full_log_softmax(trainable, dtype, tolerance):
    hidden, head, targets = problem(n=53, h=16, v=301, seed=1, dtype=dtype, scale=0.5)
    weights = torch.randn(2, 53, generator=torch.Generator().manual_seed(2), dtype=dtype)
    results = []
    for function in (plain, token_logprobs):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(trainable)
        asked = {"chunk_bytes": 7 * 301 * h.element_size(), "entropy_gradient": True}
        kwargs = asked if function is token_logprobs else {}
        logprobs, entropy, *_ = function(h, w, targets, temperature=0.7, **kwargs)
        (weights[0] * logprobs + weights[1] * entropy).sum().backward()
        results.append((h.grad, w.grad if trainable else torch.zeros(())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("trainable", [False, True])
def test_entropy_gradient_in_bfloat16(trainable):
    hidden, head, targets = problem(n=9, h=8, v=50, dtype=torch.bfloat16)
    hidden.requires_grad_()
    token_logprobs(hidden, head.requires_grad_(trainable), targets, entropy_gradient=True).entropy.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    plain(exact, head.detach().double(), targets, 1.0)[1].sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=0, atol=0.05)


@pytest.mark.parametrize("trainable", [False, True])
def test_entropy_carries_a_gradient_only_when_asked(trainable):
    hidden, head, targets = problem()
    computed = token_logprobs(hidden.requires_grad_(), head.requires_grad_(trainable), targets, entropy_gradient=True)
    assert [values.requires_grad for values in computed] == [True, True, False, False]
    with torch.no_grad():
        computed = token_logprobs(hidden, head, targets, entropy_gradient=True)
    assert not any(values.requires_grad for values in computed)


@pytest.mark.parametrize("trainable", [False, True])
def test_each_gradient_alone_and_tokens_without_weight(trainable):
    hidden, head, targets = problem()
    hidden.requires_grad_()
    head.requires_grad_(trainable)

    def gradient(value, **options):
        logprobs, entropy, *_ = token_logprobs(hidden, head, targets, chunk_bytes=TWO_LINES, **options)
        return torch.autograd.grad(value(logprobs, entropy), hidden)[0]

    alone = gradient(lambda logprobs, _: (WEIGHT * logprobs).sum())
    asked = gradient(lambda logprobs, _: (WEIGHT * logprobs).sum(), entropy_gradient=True)
    assert torch.equal(alone, asked)
    of_entropy = gradient(lambda _, entropy: (WEIGHT * entropy).sum(), entropy_gradient=True)
    assert not of_entropy[3].any()
    both = gradient(lambda logprobs, entropy: (WEIGHT * (logprobs + entropy)).sum(), entropy_gradient=True)
    torch.testing.assert_close(both, alone + of_entropy, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("trainable", [False, True])
def test_extreme_logits_have_a_finite_entropy_gradient(trainable):
    head = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=trainable)
    hidden = torch.tensor([[300.0], [0.0]], requires_grad=True)
    options = {"banned_token_ids": (2,), "entropy_gradient": True}
    token_logprobs(hidden, head, torch.tensor([0, 1]), **options).entropy.sum().backward()
    # Certain, and undecided: both are extrema.
    assert hidden.grad.flatten().tolist() == [0.0, 0.0]
    empty = torch.zeros(0, 1, requires_grad=True)
    token_logprobs(empty, head, torch.zeros(0, dtype=torch.int64), **options).entropy.sum().backward()
    assert empty.grad.shape == (0, 1)


def test_without_gradients_nothing_is_kept():
    hidden, head, targets = problem()
    with torch.no_grad():
        logprobs, *_ = token_logprobs(hidden.requires_grad_(), head.requires_grad_(), targets)
    assert logprobs.grad_fn is None
    torch.testing.assert_close(logprobs, plain(hidden, head, targets, 1.0)[0].detach())


@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_is_normalised_in_float32(trainable):
    hidden, head, targets = problem(n=9, h=8, v=50, dtype=torch.bfloat16)
    hidden.requires_grad_()
    logprobs, entropy, *_ = token_logprobs(hidden, head.requires_grad_(trainable), targets, chunk_bytes=4 * 50 * 2)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, head).float()
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    logprobs.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    exact = hidden.detach().double().requires_grad_()
    plain(exact, head.detach().double(), targets, 1.0)[0].sum().backward()
    # bfloat16 has 8 bits: 0.4 % of a sum of terms of about 1.
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_distributions_in_low_precision(dtype, trainable):
    hidden, head, targets = problem(n=40, h=16, v=301, seed=5, dtype=dtype, scale=0.5)
    computed = token_logprobs(hidden, head.requires_grad_(trainable), targets, temperature=0.7)
    # The logits are what they are in this dtype; what follows from them is exact to float32's rounding.
    logp = torch.log_softmax(torch.nn.functional.linear(hidden, head).double() / 0.7, -1)
    p, picked = logp.exp(), logp.gather(1, targets[:, None])
    entropy = -(p * logp).sum(-1)
    variance = (p * (logp + entropy[:, None]).square()).sum(-1)
    above = (p * (logp > picked)).sum(-1)
    assert all(values.dtype == torch.float32 for values in computed)
    torch.testing.assert_close(computed.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(computed.surprisal_variance.double(), variance, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(computed.mass_above.double(), above, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("banned", [(), BANNED])
@pytest.mark.parametrize("chunk_bytes", [1, TWO_LINES, 10**6])
def test_whole_distributions_hold_the_logprobs_of_the_targets(banned, chunk_bytes):
    hidden, head, targets, *_ = without_banned()
    settings = {"temperature": 0.7, "banned_token_ids": banned}
    whole = torch.cat(list(log_distributions(hidden, head, chunk_bytes=chunk_bytes, **settings)))
    assert whole.shape == (7, 11)
    assert whole.exp().sum(-1).tolist() == pytest.approx([1] * 7, rel=1e-12)
    assert not whole.exp()[:, list(banned)].any()
    picked = whole.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(picked, token_logprobs(hidden, head, targets, **settings).logprobs)


@pytest.mark.parametrize("trainable", [False, True])
def test_no_tokens(trainable):
    hidden = torch.zeros(0, 4, requires_grad=True)
    head = torch.ones(6, 4, requires_grad=trainable)
    logprobs, entropy, *_ = token_logprobs(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("trainable", [False, True])
def test_extreme_logits_stay_finite(trainable):
    head = torch.tensor([[1.0], [-1.0]], requires_grad=trainable)
    hidden = torch.tensor([[300.0], [300.0]], requires_grad=True)
    logprobs, entropy, *_ = token_logprobs(hidden, head, torch.tensor([0, 1]))
    assert logprobs.tolist() == [0.0, -600.0]
    assert entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    # d logp[1] / dh = head[1] - head[0] = -2.
    assert hidden.grad.tolist() == [[0.0], [-2.0]]


@pytest.mark.parametrize("trainable", [False, True])
def test_order_of_tokens_does_not_matter(trainable):
    hidden, head, targets = problem(n=20)
    order = list(range(20))
    random.Random(3).shuffle(order)
    head.requires_grad_(trainable)
    one, entropy, *_ = token_logprobs(hidden, head, targets, chunk_bytes=TWO_LINES)
    other, other_entropy, *_ = token_logprobs(hidden[order], head, targets[order], chunk_bytes=TWO_LINES)
    torch.testing.assert_close(other, one[order], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(other_entropy, entropy[order], rtol=1e-14, atol=1e-14)


class _Memory(TorchDispatchMode):
    """Largest tensor that any operation makes, and the most bytes that live at once of all that were made."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = self.calls = 0
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                storage = t.untyped_storage()
                # Views and in-place results make no memory.
                if storage._cdata not in given:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_tokens_times_vocabulary_never_exists(trainable, entropy_gradient):
    n, h, v, chunk = 400, 4, 1000, 8
    hidden, head, targets = problem(n=n, h=h, v=v, dtype=torch.float32)
    hidden.requires_grad_()
    head.requires_grad_(trainable)
    weight = torch.linspace(-1, 1, n)

    def step(function, **kwargs):
        hidden.grad = head.grad = None
        with _Memory() as memory:
            logprobs, entropy, *_ = function(hidden, head, targets, temperature=0.7, **kwargs)
            loss = (weight * (logprobs + entropy if entropy_gradient else logprobs)).sum()
            forward_calls = memory.calls
            loss.backward()
        assert memory.calls > forward_calls, "the mode must see the backward pass"
        return memory

    memory = step(token_logprobs, chunk_bytes=chunk * v * 4, entropy_gradient=entropy_gradient)
    assert memory.largest <= max(chunk * v, n * h, v * h)
    # A few chunks at a time (logits, their softmax, its gradient), besides tensors of the inputs' sizes.
    assert memory.peak <= 4 * (6 * chunk * v + 4 * (n * h + v * h) + 8 * n)
    # The measurement does see a whole [N, V], so the bounds mean something.
    whole = step(plain)
    assert whole.largest == n * v
    assert whole.peak >= 4 * n * v
    assert whole.peak > 5 * memory.peak


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)])
def test_chunk_bytes_bound_the_normalised_logits(dtype, size):
    n, v = 64, 500
    hidden, head, targets = problem(n=n, h=2, v=v, dtype=dtype)
    with _Memory() as memory:
        token_logprobs(hidden, head, targets, chunk_bytes=5 * v * size + 1)
    assert memory.largest == 5 * v


def test_wrong_input_is_named():
    hidden, head, targets = problem()
    shapes = r"\[N, H\], head \[V, H\] and targets \[N\], but got \(7, 5\), \(11, 5\) and \(6,\)"
    with pytest.raises(ValueError, match=shapes):
        token_logprobs(hidden, head, targets[:6])
    with pytest.raises(ValueError, match=r"but got \(7, 5\), \(11, 4\) and \(7,\)"):
        token_logprobs(hidden, head[:, :4], targets)
    with pytest.raises(ValueError, match=r"but got \(1, 7, 5\), \(11, 5\) and \(7,\)"):
        token_logprobs(hidden[None], head, targets)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"expected a temperature > 0, but got {temperature}"):
            token_logprobs(hidden, head, targets, temperature=temperature)


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 4), ("meta", 1)])
def test_only_cpus_go_through_a_chunk_in_blocks(monkeypatch, device, blocks):
    seen, right = [], logprobs_module._distribution
    monkeypatch.setattr(
        logprobs_module, "_distribution", lambda *values: (seen.append(len(values[0])), right(*values))[1]
    )
    lines, vocabulary = 4, logprobs_module.BLOCK_BYTES // 4
    hidden, head = torch.zeros(lines, 2, device=device), torch.zeros(vocabulary, 2, device=device)
    token_logprobs(hidden, head, torch.zeros(lines, dtype=torch.int64, device=device))
    assert seen == [lines // blocks] * blocks

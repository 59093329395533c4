"""The loss of a micro-batch against plain loops, its promises, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.surrogates import clipped
from grpo_lightning.functional.terms import TokenLoss
from grpo_lightning.objective import LossInputs, Objective, policy_loss

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
CLIPS = {"clip_low": None, "clip_high": None}
GRADIENTS = ("logprobs", "entropy")


def objective(weights=None, **changes):
    """An objective from settings, and the weights that the module gives it."""
    defaults = {
        "surrogate": "clipped", "surrogate_args": {}, "clips": CLIPS, "ratio_level": "token", "kl_estimator": "k3"
    }  # fmt: skip
    return replace(Objective.from_settings(**{**defaults, **changes}), **(weights or {}))


def draw(seed=0, lengths=(4, 1, 6, 3), spread=0.4, dtype=torch.float64, weightless=0.2):
    """A micro-batch; the tokens of a sequence have one advantage, some tokens no weight."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)) * 3, torch.tensor(lengths))
    n = len(sequence)

    def normal(scale=1.0):
        return (scale * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)

    old = -0.5 - torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) * 3
    own = torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)
    weight[torch.rand(n, generator=generator) < weightless] = 0
    return LossInputs(
        logprobs=(old + normal(spread)).clamp_max(-0.01).requires_grad_(),
        old_logprobs=old,
        advantages=torch.repeat_interleave(own, torch.tensor(lengths)),
        weight=weight,
        sequence=sequence,
        marked=torch.rand(n, generator=generator) < 0.3,
        behaviour=old + normal(0.5 * spread),
        focus=torch.rand(n, generator=generator) < 0.6,
        reference=old + normal(spread),
        entropy=(1 + torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)).requires_grad_(),
    )


def pick(inputs, index):
    """The same micro-batch with these tokens alone, in this order."""
    return LossInputs(**{name: None if v is None else v[index] for name, v in vars(inputs).items()})


def fresh(inputs):
    """The same with new leaves."""
    again = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in GRADIENTS}
    return replace(inputs, **again)


def backward(objective, inputs):
    """Loss and its gradients."""
    inputs = fresh(inputs)
    result = policy_loss(objective, inputs)
    result.loss.backward()
    return result, [
        torch.zeros_like(t) if t.grad is None else t.grad for t in (getattr(inputs, name) for name in GRADIENTS)
    ]


# One token at a time, by the formulas of the papers.


def ratio_of(level, log_ratios):
    """Log-ratio of each of a sequence's tokens."""
    if level == "token":
        return log_ratios
    whole = math.fsum(log_ratios)
    return [whole if level == "sequence_product" else whole / len(log_ratios)] * len(log_ratios)


def surrogate_of(name, log_ratio, advantage, logprob, marked):
    r = math.exp(log_ratio)
    if name == "clipped":
        return -min(r * advantage, min(max(r, 0.8), 1.2) * advantage)
    if name == "clip_cov":
        return 0.0 if marked else -min(r * advantage, min(max(r, 0.8), 1.2) * advantage)
    if name == "kl_cov":
        return -r * advantage + (abs(log_ratio) if marked else 0.0)
    if name == "cispo":
        return -min(r, 5.0) * advantage * logprob
    if name == "reinforce":
        return -advantage * logprob
    if name == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        return -advantage * 4 / tau / (1 + math.exp(-tau * (r - 1)))
    assert name == "dppo"
    old = math.exp(logprob - log_ratio)
    beyond = abs(math.exp(logprob) - old) > 0.15 and advantage * log_ratio > 0
    return 0.0 if beyond else -r * advantage


def kl_by_hand(name, logprob, reference):
    d = logprob - reference
    return {"k2": d * d / 2, "k3": math.exp(-d) + d - 1, "abs": abs(d)}[name]


def correction_by_hand(name, apart):
    """Weight of each of a sequence's tokens, with the settings of `CORRECTED`."""
    whole, mean = math.exp(math.fsum(apart)), math.exp(math.fsum(apart) / len(apart))
    if name is None:
        return [1.0] * len(apart)
    if name == "tis_token":
        return [min(math.exp(a), 1.2) for a in apart]
    if name == "tis_sequence":
        return [min(whole, 1.2)] * len(apart)
    if name == "mis_token":
        return [math.exp(a) if 0.8 <= math.exp(a) <= 1.2 else 0.0 for a in apart]
    assert name == "geometric_mask"
    return [1.0 if 0.9 <= mean <= 1.1 else 0.0] * len(apart)


def by_hand(inputs, case, weights):
    table = {name: values.tolist() for name, values in vars(inputs).items()}
    total = 0.0
    for sequence in sorted(set(table["sequence"])):
        tokens = [i for i, s in enumerate(table["sequence"]) if s == sequence and table["weight"][i] != 0]
        if not tokens:
            continue
        level = ratio_of(case.get("ratio_level", "token"), [
            table["logprobs"][i] - table["old_logprobs"][i] for i in tokens
        ])  # fmt: skip
        factors = correction_by_hand(
            case.get("correction"), [table["old_logprobs"][i] - table["behaviour"][i] for i in tokens]
        )
        if case.get("surrogate") == "gmpo":
            sign = math.copysign(1, table["advantages"][tokens[0]])
            mean = math.fsum(sign * min(sign * d, 0.4) for d in level) / len(level)
            losses = [-math.exp(mean) * table["advantages"][i] for i in tokens]
        else:
            name = case.get("surrogate", "clipped")
            losses = [
                surrogate_of(name, d, table["advantages"][i], table["logprobs"][i], table["marked"][i])
                for d, i in zip(level, tokens, strict=True)
            ]
        for i, loss, factor in zip(tokens, losses, factors, strict=True):
            token = loss * factor * table["focus"][i]
            if weights.get("kl_coef"):
                kl = kl_by_hand(case.get("kl_estimator", "k3"), table["logprobs"][i], table["reference"][i])
                token += weights["kl_coef"] * kl
            token -= weights.get("entropy_coef", 0) * table["entropy"][i]
            total += table["weight"][i] * token
    return total


def corrected(name, **args):
    return {"correction": name, "correction_args": args}


CASES = {
    "grpo": ({}, {}),
    "grpo with kl": ({}, {"kl_coef": 0.3}),
    "k2": ({"kl_estimator": "k2"}, {"kl_coef": 0.3}),
    "abs and entropy": ({"kl_estimator": "abs"}, {"kl_coef": 0.3, "entropy_coef": 0.2}),
    "entropy": ({"surrogate": "sapo"}, {"entropy_coef": 0.2}),
    "gspo": ({"ratio_level": "sequence"}, {"kl_coef": 0.1}),
    "gspo-token": ({"ratio_level": "sequence_token"}, {}),
    "product": ({"ratio_level": "sequence_product"}, {"entropy_coef": 0.1}),
    "cispo": ({"surrogate": "cispo", **corrected("tis_token", cap=1.2)}, {}),
    "reinforce": ({"surrogate": "reinforce", **corrected("mis_token", low=0.8, high=1.2)}, {"kl_coef": 0.1}),
    "sapo": ({"surrogate": "sapo", "ratio_level": "sequence", **corrected("tis_sequence", cap=1.2)}, {}),
    "clip_cov": ({"surrogate": "clip_cov"}, {"kl_coef": 0.1}),
    "kl_cov": ({"surrogate": "kl_cov", "ratio_level": "sequence"}, {"entropy_coef": 0.1}),
    "dppo": ({"surrogate": "dppo", **corrected("geometric_mask", low=0.9, high=1.1)}, {}),
    "gmpo": ({"surrogate": "gmpo"}, {"kl_coef": 0.2, "entropy_coef": 0.1}),
    "everything": (
        {"surrogate": "sapo", "ratio_level": "sequence_token", "kl_estimator": "k2", "focus_share": 0.5,
         **corrected("tis_token", cap=1.2)},
        {"kl_coef": 0.2, "entropy_coef": 0.1},
    ),
}  # fmt: skip

every_case = pytest.mark.parametrize(("case", "weights"), CASES.values(), ids=CASES)


@every_case
class TestEveryCombination:
    @PROPERTY
    @given(seed=st.integers(0, 10**6))
    def test_plain_loops(self, case, weights, seed):
        inputs = draw(seed)
        found = float(policy_loss(objective(weights, **case), inputs).loss)
        assert found == pytest.approx(by_hand(inputs, case, weights), rel=1e-9, abs=1e-12)

    @PROPERTY
    @given(seed=st.integers(0, 10**6), junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
    def test_tokens_of_weight_0_have_no_say(self, case, weights, seed, junk):
        inputs, which = draw(seed), objective(weights, **case)
        real = inputs.weight != 0
        held = {
            name: torch.where(real, getattr(inputs, name).detach(), junk)
            for name in ("logprobs", "old_logprobs", "advantages", "behaviour", "reference", "entropy")
        }
        dirty, gradients = backward(which, replace(inputs, **held))
        clean, expected = backward(which, pick(inputs, real))
        assert torch.equal(dirty.loss, clean.loss)
        for mine, other in zip(gradients, expected, strict=True):
            assert torch.equal(mine[real], other)
            assert (mine[~real] == 0).all()

    def test_nothing_but_tokens_of_weight_0(self, case, weights):
        inputs = draw()
        result, gradients = backward(
            objective(weights, **case), replace(inputs, weight=torch.zeros_like(inputs.weight))
        )
        assert float(result.loss) == 0
        assert all((gradient == 0).all() for gradient in gradients)

    @PROPERTY
    @given(seed=st.integers(0, 10**6), data=st.data())
    def test_the_order_has_no_say(self, case, weights, seed, data):
        inputs, which = draw(seed), objective(weights, **case)
        order = torch.tensor(data.draw(st.permutations(range(len(inputs.weight)))))
        one, gradients = backward(which, inputs)
        other, permuted = backward(which, pick(inputs, order))
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-10, atol=1e-13)
        for mine, theirs in zip(gradients, permuted, strict=True):
            torch.testing.assert_close(mine[order], theirs, rtol=1e-10, atol=1e-13)

    @PROPERTY
    @given(seed=st.integers(0, 10**6), cut=st.integers(0, 4))
    def test_micro_batches_of_whole_sequences_add_up(self, case, weights, seed, cut):
        inputs, which = draw(seed), objective(weights, **case)
        first = inputs.sequence < 3 * cut
        whole, gradients = backward(which, inputs)
        parts = [(where, *backward(which, pick(inputs, where))) for where in (first, ~first)]
        torch.testing.assert_close(whole.loss, parts[0][1].loss + parts[1][1].loss, rtol=1e-10, atol=1e-13)
        for where, _, found in parts:
            for mine, part in zip(gradients, found, strict=True):
                torch.testing.assert_close(mine[where], part, rtol=1e-10, atol=1e-13)

    def test_gradcheck(self, case, weights):
        inputs, which = draw(3, spread=0.2), objective(weights, **case)

        def loss(logprobs, entropy):
            return policy_loss(which, replace(inputs, logprobs=logprobs, entropy=entropy)).loss

        if case.get("surrogate") == "cispo" or case.get("ratio_level") == "sequence_token":
            pytest.skip("its gradient stops at a detached part, which finite differences see")
        assert torch.autograd.gradcheck(loss, (inputs.logprobs, inputs.entropy))

    def test_float32(self, case, weights):
        which = objective(weights, **case)
        single, double = draw(5, dtype=torch.float32), draw(5)
        torch.testing.assert_close(
            policy_loss(which, single).loss.double(), policy_loss(which, double).loss, rtol=1e-4, atol=1e-5
        )


class TestResult:
    def test_log_ratio_is_each_tokens_own_whatever_the_level(self):
        inputs = draw()
        found = policy_loss(objective(ratio_level="sequence"), inputs)
        assert torch.equal(found.log_ratio, (inputs.logprobs - inputs.old_logprobs).detach())
        assert not found.log_ratio.requires_grad

    def test_marks_stand_at_the_tokens_of_weight(self):
        inputs = draw(1, spread=1.0)
        found = policy_loss(objective(**corrected("mis_token", low=0.8, high=1.2)), inputs)
        real, ratio = inputs.weight != 0, (inputs.logprobs - inputs.old_logprobs).exp()
        good, bad = inputs.advantages > 0, inputs.advantages < 0
        apart = (inputs.old_logprobs - inputs.behaviour).exp()
        assert torch.equal(found.clipped_low, real & bad & (ratio < 0.8))
        assert torch.equal(found.clipped_high, real & good & (ratio > 1.2))
        assert torch.equal(found.dropped, real & ((apart < 0.8) | (apart > 1.2)))
        assert not found.capped.any()
        kept = torch.where(found.dropped | ~inputs.focus, 0.0, apart)
        assert torch.equal(found.factor[~real], torch.ones(int((~real).sum()), dtype=torch.float64))
        torch.testing.assert_close(found.factor[real], kept[real])
        assert found.clipped_low.any()
        assert found.clipped_high.any()
        assert found.dropped.any()

    def test_capped(self):
        inputs = draw(1, spread=1.0)
        found = policy_loss(objective(**corrected("tis_token", cap=1.2)), inputs)
        apart = (inputs.old_logprobs - inputs.behaviour).exp()
        assert torch.equal(found.capped, (inputs.weight != 0) & (apart > 1.2))
        assert found.capped.any()
        assert not found.dropped.any()

    def test_kl_and_entropy_are_not_corrected_and_of_all_tokens(self):
        """Out of focus, or dropped by the correction, a token still counts in both."""
        inputs = replace(draw(), advantages=torch.zeros(14, dtype=torch.float64))
        weights = {"kl_coef": 0.3, "entropy_coef": 0.2}
        plain = policy_loss(objective(weights), replace(inputs, focus=None))
        both = policy_loss(objective(weights, **corrected("mis_token", low=0.9, high=0.95)), inputs)
        assert both.dropped.any()
        torch.testing.assert_close(both.loss, plain.loss)


class TestNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["tis_token", "tis_sequence", "mis_token", "mis_sequence"])
    def test_of_the_trainer_beside_a_correction(self, name, value):
        """No exception, which would come in one process alone: the checks of the update name it."""
        inputs = draw(weightless=0)
        old = inputs.old_logprobs.clone()
        old[2] = value
        if math.isinf(value):
            # The ratio itself refuses infinities, by name.
            with pytest.raises(ValueError, match="expected finite old logprobs"):
                policy_loss(objective(correction=name), replace(inputs, old_logprobs=old))
            return
        result = policy_loss(objective(correction=name), replace(inputs, old_logprobs=old))
        assert result.loss.isnan()
        assert result.log_ratio.isnan().any()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_of_the_engine_beside_a_correction(self, value):
        inputs = draw(weightless=0)
        behaviour = inputs.behaviour.clone()
        behaviour[2] = value
        result = policy_loss(objective(correction="tis_token"), replace(inputs, behaviour=behaviour))
        assert result.loss.isnan()

    def test_of_the_policy(self):
        inputs = draw(weightless=0)
        logprobs = inputs.logprobs.detach().clone()
        logprobs[0] = math.nan
        assert policy_loss(objective(), replace(inputs, logprobs=logprobs)).loss.isnan()

    def test_of_a_token_without_weight_beside_a_correction(self):
        inputs = draw(weightless=0)
        weight, old = inputs.weight.clone(), inputs.old_logprobs.clone()
        weight[2], old[2] = 0, math.nan
        result = policy_loss(objective(correction="tis_token"), replace(inputs, weight=weight, old_logprobs=old))
        assert result.loss.isfinite()


class TestRefusals:
    def test_old_logprobs_with_a_gradient(self):
        inputs = draw()
        with pytest.raises(ValueError, match="expected old logprobs without gradient, but they require grad"):
            policy_loss(objective(), replace(inputs, old_logprobs=inputs.logprobs))

    @pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "weight"])
    def test_shapes(self, name):
        inputs = draw()
        with pytest.raises(ValueError, match=r"expected tensors of one shape \[N\], but got shapes"):
            policy_loss(objective(), replace(inputs, **{name: getattr(inputs, name).detach()[:-1]}))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"surrogate": "cliped"}, "did you mean 'clipped'?"),
            ({"surrogate": "gspo"}, "expected surrogate to be one of cispo, clip_cov"),
            ({"ratio_level": "sequenc"}, "did you mean 'sequence'?"),
            ({"kl_estimator": "k4"}, "expected kl_estimator to be one of k1, k2, k3, abs"),
            ({"correction": "tis_tokn"}, "did you mean 'tis_token'?"),
            ({"surrogate": "sapo", "surrogate_args": {"tau": 1.0}}, "'sapo' has no setting 'tau'; it has tau_positive"),
            ({"surrogate": "reinforce", "clips": {"clip_low": 0.1, "clip_high": None}}, "no setting 'clip_low'"),
            ({"surrogate_args": {"dual_clip": 0.5}}, "expected dual_clip > 1, but got 0.5"),
            ({"clips": {"clip_low": 1.5, "clip_high": None}}, "expected 0 <= clip_low < 1"),
            ({"surrogate": "clip_cov", "surrogate_args": {"share": 2.0}}, "expected 0 < share <= 1, but got 2.0"),
            ({"surrogate": "clip_cov", "surrogate_args": {"keys_N": 1}}, "no setting 'keys_N'"),
            ({"surrogate": "kl_cov", "surrogate_args": {"kl_cov_coef": -1}}, "expected kl_cov_coef >= 0"),
            ({"surrogate": "kl_cov", "surrogate_args": {"low": 1}}, "'kl_cov' has no setting 'low'"),
            ({"surrogate": "gmpo", "ratio_level": "sequence"}, "expected ratio_level 'token', but got 'sequence'"),
            ({"surrogate": "dppo", "ratio_level": "sequence_token"}, "surrogate 'dppo' compares single tokens"),
            ({"kl_estimator": "k1"}, "kl_in='reward' takes it"),
            ({"kl_in": "loos"}, "expected kl_in to be 'loss' or 'reward', but got 'loos'"),
            ({"old_logprobs": "both"}, "expected old_logprobs to be 'engine' or 'trainer', but got 'both'"),
            ({"focus_share": 0.0}, "expected 0 < focus_share <= 1, or none, but got 0.0"),
            ({"focus_share": 1.5}, "expected 0 < focus_share <= 1"),
            ({"focus_share": math.nan}, "expected 0 < focus_share <= 1"),
            (corrected("tis_token", cap=0), "expected a finite cap > 0, but got 0"),
            (corrected("tis_token", cap=math.inf), "expected a finite cap > 0"),
            (corrected("mis_token", low=2.0, high=1.0), "expected 0 <= low < high"),
            (corrected("geometric_mask"), "cannot be used with {}: .*'low' and 'high'"),
            (corrected("reject_k3", limit=1), "has no setting 'limit'; it has threshold"),
            (corrected("reject_k1", threshold=-1), "expected a finite threshold >= 0, but got -1"),
        ],
    )  # fmt: skip
    def test_settings(self, changes, message):
        with pytest.raises(ConfigurationError, match=message):
            objective(**changes)

    def test_k1_in_the_reward(self):
        assert objective(kl_estimator="k1", kl_in="reward").kl_estimator == "k1"

    def test_settings_of_a_correction_that_is_not_there(self):
        with pytest.raises(
            ConfigurationError, match="expected a correction beside correction_args, but got {'cap': 3.0} alone"
        ):
            objective(correction_args={"cap": 3.0})


class TestSettings:
    def test_settings_reach_their_functions(self):
        inputs = draw(2, spread=1.0)
        wide = objective(clips={"clip_low": 0.9, "clip_high": 100.0})
        assert float(policy_loss(wide, inputs).loss) != float(policy_loss(objective(), inputs).loss)
        assert not policy_loss(wide, inputs).clipped_high.any()

    def test_marks_have_settings_of_their_own(self):
        which = objective(surrogate="clip_cov", surrogate_args={"share": 0.5, "low": -9.0, "clip_low": 0.3})
        logprobs = -torch.arange(1.0, 9.0, dtype=torch.float64)
        keys = torch.arange(8, dtype=torch.float64) / 8
        assert which.marks(logprobs, -logprobs, keys).tolist() == [False, True, True, True, True, False, False, False]
        assert which.surrogate.keywords == {"clip_low": 0.3}

    def test_marks_of_largest_covariance_need_no_keys(self):
        which = objective(surrogate="kl_cov", surrogate_args={"share": 0.25})
        logprobs = torch.tensor([-3.0, -1.0, -1.0, -3.0], dtype=torch.float64)
        advantages = torch.tensor([1.0, 2.0, -1.0, -1.0], dtype=torch.float64)
        assert which.marks(logprobs, advantages, torch.zeros(4, dtype=torch.float64)).tolist() == [
            False, True, False, False
        ]  # fmt: skip

    @pytest.mark.parametrize("surrogate", ["clipped", "cispo", "sapo", "dppo", "gmpo", "reinforce"])
    def test_others_mark_nothing(self, surrogate):
        assert objective(surrogate=surrogate).marks is None

    @pytest.mark.parametrize(
        ("changes", "weights", "expected"),
        [
            ({}, {}, (False, False)),
            ({"old_logprobs": "trainer"}, {}, (True, True)),
            ({"correction": "tis_token"}, {}, (True, True)),
            ({"focus_share": 0.2}, {}, (False, True)),
            ({"kl_in": "reward"}, {"kl_reward": 0.1}, (False, True)),
            ({}, {"kl_coef": 0.1}, (False, False)),
        ],
    )
    def test_what_is_computed_before_the_epoch(self, changes, weights, expected):
        found = objective(weights, **changes)
        assert (found.proximal, found.rescores) == expected

    def test_focus(self):
        assert objective().focus is None
        entropy = torch.tensor([0.1, 3.0, 2.0, 0.2, 0.3], dtype=torch.float64)
        assert objective(focus_share=0.3).focus(entropy).tolist() == [False, True, True, False, False]


class TestPlainClips:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, (0.2, 0.2)),
            ({"clips": {"clip_low": 0.1, "clip_high": None}}, (0.1, 0.2)),
            ({"clips": {"clip_low": None, "clip_high": 0.28}}, (0.2, 0.28)),
            ({"surrogate_args": {"clip_high": 0.3}}, (0.2, 0.3)),
            ({"surrogate": clipped}, (0.2, 0.2)),
            ({"old_logprobs": "trainer"}, (0.2, 0.2)),
            ({"surrogate_args": {"dual_clip": 3.0}}, None),
            ({"surrogate_args": {"delta": 4.0}}, None),
            ({"ratio_level": "sequence"}, None),
            ({"kl_estimator": "k2"}, None),
            ({"correction": "tis_token"}, None),
            ({"focus_share": 0.2}, None),
            ({"surrogate": "sapo"}, None),
            ({"surrogate": "clip_cov"}, None),
        ],
    )
    def test_where_it_is_grpo(self, changes, expected):
        assert objective(**changes).plain_clips() == expected


def squared(terms, *, scale=1.0):
    """A surrogate of one's own."""
    none = torch.zeros_like(terms.marked)
    return TokenLoss(scale * (terms.log_ratio - terms.advantages).square(), none, none)


class TestOwnSurrogate:
    @pytest.mark.parametrize("named", [squared, "test_objective.squared"])
    def test_as_function_and_as_import_path(self, named):
        inputs = draw()
        found = policy_loss(objective(surrogate=named, surrogate_args={"scale": 2.0}), replace(inputs, focus=None))
        expected = 2 * (inputs.logprobs - inputs.old_logprobs - inputs.advantages).square()
        torch.testing.assert_close(found.loss, (inputs.weight * expected).sum())

    def test_its_settings_are_checked(self):
        with pytest.raises(ConfigurationError, match="surrogate 'squared' has no setting 'size'; it has scale"):
            objective(surrogate=squared, surrogate_args={"size": 1})
        with pytest.raises(ConfigurationError, match="no setting 'clip_low'"):
            objective(surrogate=squared, clips={"clip_low": 0.1, "clip_high": None})

    def test_an_import_path_that_is_none(self):
        with pytest.raises(ConfigurationError, match="surrogate='test_objective.nothing' cannot be imported"):
            objective(surrogate="test_objective.nothing")

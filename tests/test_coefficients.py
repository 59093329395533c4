"""Weights in the loss that follow what training measures."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning import GRPOModule
from grpo_lightning.coefficients import Coefficients, Controls
from grpo_lightning.errors import ConfigurationError

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
KL = Controls(kl_target=0.01, kl_horizon=10)
ENTROPY = Controls(entropy_target=2.0, entropy_step=0.25, entropy_max=0.6)


def starting(controls=KL, kl=0.5, entropy=0.0):
    return Coefficients.start(kl, entropy, controls)


class TestKL:
    # Error kl / target - 1 clipped to -0.2 .. 0.2, over the horizon of 10: 1.02 at most, 0.98 at least.
    @pytest.mark.parametrize(
        ("observed", "expected"),
        [(0.01, 0.5), (0.011, 0.505), (0.009, 0.495), (1.0, 0.51), (0.0, 0.49), (-3.0, 0.49)],
    )
    def test_golden(self, observed, expected):
        assert starting().after(KL, observed, 1.0).kl == pytest.approx(expected, rel=1e-12)

    def test_a_kl_that_was_not_computed_changes_nothing(self):
        assert starting().after(KL, None, 1.0) == starting()

    def test_without_a_target_it_stays(self):
        assert starting(Controls()).after(Controls(), 100.0, 1.0) == starting(Controls())

    def test_it_does_not_touch_the_entropy(self):
        assert starting(entropy=0.2).after(KL, 1.0, 0.0).entropy_active == 0.2

    @PROPERTY
    @given(st.lists(st.floats(-1, 1), max_size=30))
    def test_it_stays_positive_and_moves_slowly(self, observed):
        now = starting()
        for kl in observed:
            last, now = now, now.after(KL, kl, 1.0)
            assert now.kl > 0
            assert 0.98 * last.kl - 1e-12 <= now.kl <= 1.02 * last.kl + 1e-12


class TestEntropy:
    def test_golden(self):
        # Below 2 up by 0.25 until 0.6; above down, and out of the loss.
        now, found = starting(ENTROPY), []
        for entropy in (1.0, 1.5, 2.0, 2.5, 1.9, 3.0, 3.0, 3.0, 3.0):
            now = now.after(ENTROPY, None, entropy)
            found.append((now.entropy, now.entropy_active))
        remembered, active = zip(*found, strict=True)
        assert remembered == pytest.approx((0.25, 0.5, 0.6, 0.35, 0.6, 0.35, 0.1, 0, 0))
        assert active == pytest.approx((0.25, 0.5, 0.6, 0, 0.6, 0, 0, 0, 0))

    def test_before_the_first_update_nothing_stands_in_the_loss(self):
        assert starting(ENTROPY, entropy=0.3) == Coefficients(0.5, 0.3, 0.0)

    def test_without_a_target_the_weight_stands_in_the_loss(self):
        assert starting(Controls(), entropy=0.3).entropy_active == 0.3

    @PROPERTY
    @given(st.lists(st.floats(0, 5), max_size=30))
    def test_bounds(self, observed):
        now = starting(ENTROPY)
        for entropy in observed:
            now = now.after(ENTROPY, None, entropy)
            assert 0 <= now.entropy <= 0.6
            assert now.entropy_active == (now.entropy if entropy <= 2.0 else 0.0)


class TestShown:
    def test_only_what_is_controlled(self):
        now = Coefficients(0.5, 0.3, 0.2)
        assert Controls().shown(now) == {}
        assert KL.shown(now) == {"policy/kl_coef": 0.5}
        assert ENTROPY.shown(now) == {"policy/entropy_coef": 0.2}


class TestRefusals:
    @pytest.mark.parametrize(
        ("controls", "kl_coef", "message"),
        [
            ({"kl_target": 0.0}, 0.1, "expected kl_target > 0 and finite, but got 0.0"),
            ({"kl_target": math.nan}, 0.1, "expected kl_target > 0 and finite, but got nan"),
            ({"kl_target": 0.1}, 0.0, "expected kl_coef > 0 beside kl_target"),
            ({"kl_horizon": -1.0}, 0.1, "expected kl_horizon > 0 and finite, but got -1"),
            ({"kl_horizon": 0.5}, 0.1, "expected kl_horizon >= 1 optimizer step, but got 0.5"),
            ({"entropy_target": -0.1}, 0.1, "expected entropy_target >= 0 and finite, but got -0.1"),
            ({"entropy_target": math.nan}, 0.1, "expected entropy_target >= 0 and finite, but got nan"),
            ({"entropy_step": 0.0}, 0.1, "expected entropy_step > 0 and finite, but got 0.0"),
            ({"entropy_max": 0.0}, 0.1, "expected entropy_max > 0 and finite, but got 0.0"),
        ],
    )
    def test_by_name(self, tiny_model, controls, kl_coef, message):
        with pytest.raises(ConfigurationError, match=message):
            Controls(**controls).check(kl_coef)
        with pytest.raises(ConfigurationError, match=message):
            GRPOModule(tiny_model, kl_coef=kl_coef, **controls)

    def test_what_is_allowed(self):
        Controls().check(0.0)
        Controls(kl_target=0.1, kl_horizon=1, entropy_target=0.0).check(1e-3)

    @pytest.mark.parametrize("name", ["kl_target", "kl_horizon", "entropy_target", "entropy_step", "entropy_max"])
    def test_infinity(self, name):
        with pytest.raises(ConfigurationError, match=f"{name}"):
            Controls(**{"kl_target": 0.1, name: math.inf}).check(0.1)

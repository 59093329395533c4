"""Truncated sampling needs a correction that takes it back."""

from functools import partial

import pytest
from fakes import FakeEngine
from runs import MODEL, data, trainer

from grpo_lightning import GRPOModule
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.correction import CORRECTIONS, COVERS_TRUNCATION, Correction, tis_token
from grpo_lightning.truncation_check import check_truncation


def own(log_ratio_N, weight_N, sequence_N):
    nothing = weight_N != weight_N
    return Correction(log_ratio_N.exp(), nothing, nothing)


@pytest.mark.parametrize("correction", [None, "geometric_mask", "reject_k1", "reject_k3"])
@pytest.mark.parametrize("bounds", [(0.9, 0), (1.0, 20)])
def test_without_a_correction_that_holds_the_ratio_it_is_refused(correction, bounds):
    with pytest.raises(
        ConfigurationError, match="to be one of tis_token, tis_sequence, mis_token, mis_sequence, whose"
    ):
        check_truncation(*bounds, None if correction is None else CORRECTIONS[correction])
    check_truncation(1.0, 0, None if correction is None else CORRECTIONS[correction])


@pytest.mark.parametrize("correction", sorted(COVERS_TRUNCATION))
def test_with_one_it_is_allowed(correction, recwarn):
    assert set(COVERS_TRUNCATION) <= set(CORRECTIONS)
    check_truncation(0.9, 20, CORRECTIONS[correction])
    check_truncation(0.9, 20, partial(CORRECTIONS[correction], cap=2.0))
    assert not [w for w in recwarn if "truncated" in str(w.message)]


def test_ones_own_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match=r"truncated \(top_p=0.9, top_k=0\).*is not one of ours"):
        check_truncation(0.9, 0, own)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.5}, "0 < top_p <= 1"),
        ({"top_p": float("nan")}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k to be a whole number >= 0"),
        ({"top_k": 2.5}, "top_k to be a whole number >= 0"),
    ],
)
def test_bounds_out_of_range_are_refused_at_once(bounds, words):
    with pytest.raises(ConfigurationError, match=words):
        data(FakeEngine(), **bounds)


@pytest.mark.parametrize(
    "correction",
    [
        own,
        lambda log_ratio, weight, sequence: own(log_ratio, weight, sequence),
        partial(tis_token, cap=3.0),
        "grpo_lightning.functional.correction.mis_token",
    ],
    ids=["function", "lambda", "partial", "import path"],
)
def test_a_run_takes_whatever_names_one(tmp_path, tiny_model, correction):
    engine = FakeEngine()
    trainer(tmp_path, max_epochs=1).fit(GRPOModule(tiny_model, correction=correction, **MODEL), data(engine, top_p=0.9))
    assert engine.requests


def test_a_run_without_one_is_refused_before_the_engine_starts(tmp_path, tiny_model):
    engine = FakeEngine()
    with pytest.raises(ConfigurationError, match="correction to be one of tis_token"):
        trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(engine, top_p=0.9))
    assert not engine.specs


def test_only_what_is_trained_on_is_truncated(tmp_path, tiny_model):
    engine = FakeEngine()
    module = GRPOModule(tiny_model, **MODEL, correction="tis_token")
    rollouts = data(engine, top_p=0.9, top_k=40, val_size=6, val_samples=2, advantage="remax")
    trainer(tmp_path, max_epochs=1).fit(module, rollouts)
    seen = {(params.temperature, params.top_p, params.top_k) for _, params, *_ in engine.requests}
    # Greedy baselines and answers to held-out tasks, sampled ones, and the rollout.
    assert seen == {(0.0, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.9, 40)}
    assert rollouts.rollout.origin.truncated

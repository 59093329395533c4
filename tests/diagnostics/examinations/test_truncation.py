"""Runs that truncate on purpose: the doctor is silent, and still finds what is wrong."""

from dataclasses import replace

import pytest
import torch
from runs import MODEL, data, trainer

import grpo_lightning.rollout.transformers_engine as module_of_the_engine
from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.callbacks import RatioDegeneracyDetector, RunDoctor
from grpo_lightning.diagnostics.verdict import Status
from grpo_lightning.errors import DegeneracyError

SETTINGS = {"max_tokens": 16, "prompts_per_rollout": 8, "samples_per_prompt": 4}
pick = module_of_the_engine._pick


def short(completion):
    return -float(len(completion))


class Everything(RunDoctor):
    """Keeps all verdicts."""

    def __init__(self, **settings):
        super().__init__(report=False, **settings)
        self.seen = []

    def _conclude(self, run, verdicts):
        self.seen += verdicts
        super()._conclude(run, verdicts)


def fit(tmp_path, model, engine, *, epochs=3, doctor=None, dtype="float32", correction="tis_token", **settings):
    doctor = doctor or Everything(ascent_every=4)
    run = trainer(tmp_path, callbacks=[doctor], max_epochs=epochs)
    module = GRPOModule(model, **{**MODEL, "dtype": dtype}, correction=correction, kl_coef=0.01)
    run.fit(module, data(engine, short, **{**SETTINGS, **settings}))
    return doctor, run


def engine(change, *, after=0, dtype="float32"):
    """An engine that samples wrongly from some truncated batch of tokens on: ``change(logits, params, generators)``."""
    calls = 0

    def sampled(logits, params, generators):
        nonlocal calls
        calls += params.top_p < 1 or params.top_k > 0
        wrong = after == 0 or calls > after
        return change(logits, params, generators) if wrong else pick(logits, params, generators)

    module_of_the_engine._pick = sampled
    return TransformersEngine(dtype=dtype)


@pytest.fixture(autouse=True)
def restored():
    yield
    module_of_the_engine._pick = pick


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9, "canary_tokens": 64},
        {"top_p": 0.9, "canary_tokens": 0, "updates_per_rollout": 2},
        {"top_k": 10, "canary_tokens": 0, "inner_epochs": 2},
        {"top_p": 0.6, "top_k": 30, "temperature": 0.7, "canary_tokens": 64},
    ],
)
def test_what_is_declared_raises_no_alarm(tiny_model, tmp_path, dtype, settings):
    settings = dict(settings)
    doctor = Everything(ascent_every=4, canary_tokens=settings.pop("canary_tokens"))
    doctor, run = fit(
        tmp_path, tiny_model, TransformersEngine(dtype=dtype), epochs=6, doctor=doctor, dtype=dtype, **settings
    )
    assert not [str(v) for v in doctor.seen if v.status is Status.FAIL]
    passed = [v for v in doctor.seen if v.status is Status.PASS]
    # Before the first rollout, without and with truncation, and at each rollout.
    for check, times in {"mismatch": 8, "alignment": 6, "sampler logprobs": 6, "logprob semantics": 2}.items():
        assert sum(v.check == check for v in passed) >= times, check
    windows = [v for v in passed if v.check == "sampling distribution"]
    # Top-k in bfloat16 leaves few tokens of which it is sure that they are kept.
    assert len(windows) >= 3
    assert max(v.evidence["tokens"] for v in windows) > (700 if dtype == "float32" else 500)
    assert run.callback_metrics["mismatch/logprob_abs_mean"] > 0.05, "it is truncated"
    # The ratio's weight is the kept mass.
    assert run.callback_metrics["correction/weight_mean"] < 0.95


def test_the_detector_alone_raises_no_alarm(tiny_model, tmp_path):
    doctor, run = fit(
        tmp_path, tiny_model, TransformersEngine(dtype="float32"), doctor=RatioDegeneracyDetector(), top_p=0.8
    )
    assert run.global_step == 3
    assert {v.check: v.status for v in doctor.verdicts}["mismatch"] is Status.PASS


def with_top_p(top_p):
    return lambda logits, params, generators: pick(logits, replace(params, top_p=top_p), generators)


def raw(logits, params, generators):
    tokens, _ = pick(logits, params, generators)
    whole = (logits.float() / params.temperature).log_softmax(-1)
    return tokens, whole.gather(1, tokens[:, None]).squeeze(1)


def zero(logits, params, generators):
    tokens, s = pick(logits, params, generators)
    return tokens, torch.zeros_like(s)


def mostly_zero(logits, params, generators):
    tokens, s = pick(logits, params, generators)
    return tokens, s * (tokens % 5 == 0)


@pytest.mark.parametrize(
    ("change", "cause", "words"),
    [
        # In bfloat16 a few hundred tokens do not tell that from dropping what is below 0.01.
        (with_top_p(1.0), "truncated_sampling", "no truncation|min_p = 0.01"),
        (with_top_p(0.7), "truncated_sampling", "top_p = 0.7"),
        (raw, "truncated_sampling", "no truncation"),
        (zero, "logprobs_zero", "are all 0"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_truncates_otherwise_is_named_before_the_first_rollout(
    tiny_model, tmp_path, change, cause, words, dtype
):
    doctor = Everything(canary_tokens=0)

    def asked(logits, params, generators):
        return (change if params.top_p < 1 else pick)(logits, params, generators)

    with pytest.raises(DegeneracyError, match=words):
        fit(tmp_path, tiny_model, engine(asked, dtype=dtype), doctor=doctor, dtype=dtype, top_p=0.9)
    assert cause in [v.cause for v in doctor.seen if v.status is Status.FAIL]
    assert not [v for v in doctor.seen if v.check == "old logprobs"], "nothing was trained on"


def test_an_engine_that_truncates_what_is_not_asked_for_is_still_named(tiny_model, tmp_path):
    with pytest.raises(DegeneracyError, match="cuts off unlikely tokens"):
        fit(tmp_path, tiny_model, engine(with_top_p(0.9)), correction=None)
    with pytest.raises(DegeneracyError, match="cuts off unlikely tokens"):
        fit(tmp_path, tiny_model, engine(with_top_p(0.8)), top_p=0.9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_top_p(1.0), "no truncation"),
        (with_top_p(0.7), "top_p = 0.7"),
        (raw, "no truncation"),
        (mostly_zero, "filled in with zeros"),
    ],
)
def test_a_fault_that_comes_later(tiny_model, tmp_path, change, words):
    """After pre-flight and the first rollout, of 16 tokens each."""
    doctor = Everything(canary_tokens=0)
    with pytest.raises(DegeneracyError):
        fit(tmp_path, tiny_model, engine(change, after=32), doctor=doctor, top_p=0.9)
    assert any(words in str(v) for v in doctor.seen if v.status is Status.FAIL)


def test_the_loss_is_that_of_the_kept_tokens(tiny_model, tmp_path):
    """Each token's surrogate is weighted by the mass that was kept where it was drawn."""
    kept = []

    class Note(Everything):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept.append((self._kept, pl_module.current_update().evidence))
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    fit(tmp_path, tiny_model, TransformersEngine(dtype="float32"), epochs=2, doctor=Note(), top_p=0.7)
    for found, evidence in kept:
        row = {int(r): n for n, r in enumerate(evidence.ledger_index)}
        factor = evidence.factor[[row[int(r)] for r in found.ledger_index]]
        torch.testing.assert_close(factor, found.log_mass.exp(), atol=1e-4, rtol=0)
        assert float(factor.min()) >= 0.7 - 1e-4

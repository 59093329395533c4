"""Layers compiled by torch.compile compute what the plain ones do."""

import os
import subprocess
import sys

import pytest
import torch
from fakes import FakeEngine
from runs import MODEL, Gradients, RecordingEngine, data, trainer
from test_policy import FAMILIES, ROWS, gradients, make_rows, save, tiny_policy
from torch._dynamo.utils import counters

from grpo_lightning import GRPOModule, compiled
from grpo_lightning.attention import SHARED_PROMPT
from grpo_lightning.callbacks import RunDoctor
from grpo_lightning.compiled import as_in_training, compile_layers
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loading import load_policy
from grpo_lightning.policy import evaluating
from grpo_lightning.rollout.packing import pack


@pytest.fixture(scope="module", autouse=True)
def _few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "FEWEST_TOKENS", 1)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "qwen3", FAMILIES["qwen3"][0], FAMILIES["qwen3"][1]())


@pytest.fixture(scope="module")
def policies(directory):
    """The same policy compiled and not."""
    return tiny_policy(directory, torch_compile=True), tiny_policy(directory)


def assert_equal(got, expected):
    # Norms are computed in float32 whatever the model's dtype is.
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def assert_gradients_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-9, name


def test_log_probabilities_and_gradients_are_the_same(policies):
    fast, plain = policies
    before = counters["frames"]["ok"]
    for lengths in ROWS.values():
        batch = pack(make_rows(lengths), 0.7)
        got, expected = fast.token_logprobs(batch).logprobs, plain.token_logprobs(batch).logprobs
        assert_equal(got, expected)
        assert_gradients_equal(gradients(fast, got), gradients(plain, expected))
    assert counters["frames"]["ok"] > before


def test_scores_that_the_loss_compares_with_repeat_training_to_the_bit(policies):
    fast, _ = policies
    batch = pack(make_rows(ROWS["mixed"]), 0.7)
    trained = fast.token_logprobs(batch).logprobs.detach()
    with torch.no_grad(), evaluating(fast), as_in_training():
        scored = fast.token_logprobs(batch).logprobs
    assert not scored.requires_grad
    assert torch.equal(scored, trained)


def test_ordinary_forwards_stay_as_they_are(policies):
    fast, plain = policies
    ids = torch.arange(24).reshape(3, 8)
    assert torch.equal(fast.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)


def test_passes_without_gradients_stay_as_they_are(policies):
    fast, plain = policies
    batch = pack(make_rows(ROWS["mixed"]), 0.7)
    with torch.no_grad():
        assert torch.equal(fast.token_logprobs(batch).logprobs, plain.token_logprobs(batch).logprobs)


def test_small_batches_stay_as_they_are(policies, monkeypatch):
    fast, plain = policies
    batch = pack(make_rows(ROWS["mixed"]), 0.7)
    monkeypatch.setattr(compiled, "FEWEST_TOKENS", batch.num_tokens + 1)
    assert torch.equal(fast.token_logprobs(batch).logprobs, plain.token_logprobs(batch).logprobs)


def test_recomputation_and_the_base_alone(directory, policies):
    recomputing = tiny_policy(directory, torch_compile=True, gradient_checkpointing=True)
    _, plain = policies
    batch = pack(make_rows(ROWS["mixed"]), 0.7)
    got, expected = recomputing.token_logprobs(batch).logprobs, plain.token_logprobs(batch).logprobs
    assert_gradients_equal(gradients(recomputing, got), gradients(plain, expected))
    with as_in_training(), recomputing.reference(), plain.reference():
        got, expected = recomputing.token_logprobs(batch).logprobs, plain.token_logprobs(batch).logprobs
    assert_equal(got, expected)
    assert not got.requires_grad


def test_in_bfloat16_it_rounds_no_more_than_the_plain_layers(directory):
    batch = pack(make_rows(ROWS["mixed"] * 8), 1.0)
    exact = tiny_policy(directory)
    weights = {name: p.detach() for name, p in exact.trainable_parameters().items()}
    wanted = gradients(exact, exact.token_logprobs(batch).logprobs)
    errors = []
    for compiles in (True, False):
        policy = load_policy(directory, dtype="bfloat16", lora_rank=3, torch_compile=compiles)
        with torch.no_grad():
            for name, parameter in policy.trainable_parameters().items():
                parameter.copy_(weights[name])
        found = gradients(policy, policy.token_logprobs(batch).logprobs)
        errors.append(sum(float((found[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5)
    assert errors[0] < 1.2 * errors[1]


def test_a_run_is_the_plain_one(tmp_path, tiny_model):
    steps, verdicts = [], []
    for compiles in (True, False):
        torch.manual_seed(0)
        collected, doctor = Gradients(), RunDoctor()
        fit = trainer(tmp_path, callbacks=[collected, doctor])
        module = GRPOModule(tiny_model, torch_compile=compiles, old_logprobs="trainer", **MODEL)
        fit.fit(module, data(RecordingEngine()))
        steps.append(torch.stack(collected.steps))
        verdicts.append({verdict.check: verdict.status for verdict in doctor.verdicts})
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-4 * float(steps[1].abs().max()))
    assert verdicts[0] == verdicts[1]


def test_other_attention_is_refused(directory):
    with pytest.raises(ConfigurationError, match=f"'{SHARED_PROMPT}' with torch_compile, but got 'sdpa'"):
        load_policy(directory, dtype="float32", attn_implementation="sdpa", torch_compile=True)


def test_a_model_without_named_layers_is_refused(directory):
    policy = tiny_policy(directory)
    policy.causal_lm._no_split_modules = None
    with pytest.raises(ConfigurationError, match="names none that it has"):
        compile_layers(policy.causal_lm)


def test_a_missing_compiler_is_named_before_the_engine_starts(tmp_path):
    code = "from grpo_lightning.compiled import require_compiler; require_compiler()"
    variables = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigurationError: expected a C++ compiler" in done.stderr
    assert "leave torch_compile out" in last


def test_the_compiler_is_asked_for_before_the_model_is_loaded(tmp_path, tiny_model, monkeypatch):
    def refuse():
        raise ConfigurationError("expected a C++ compiler")

    monkeypatch.setattr("grpo_lightning.policy_module.require_compiler", refuse)
    module, engine = GRPOModule(tiny_model, torch_compile=True, **MODEL), FakeEngine()
    with pytest.raises(ConfigurationError, match=r"expected a C\+\+ compiler"):
        trainer(tmp_path).fit(module, data(engine))
    assert not hasattr(module, "policy")
    assert engine.calls == []

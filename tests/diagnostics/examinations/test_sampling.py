"""Engines that sample or report wrongly are found before the first rollout, and named."""

import math
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from runs import MODEL, data, trainer
from safetensors.torch import load_file, save_file

import grpo_lightning.policy
import grpo_lightning.rollout.transformers_engine as module_of_the_engine
from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.callbacks import RunDoctor
from grpo_lightning.diagnostics.curve import Curve
from grpo_lightning.diagnostics.examinations import ratio, rollout, sampling
from grpo_lightning.diagnostics.examinations.sampling import SamplingExamination
from grpo_lightning.errors import DegeneracyError
from grpo_lightning.policy import Policy
from grpo_lightning.rollout.batch import PROMPT

SETTINGS = {"max_tokens": 16, "prompts_per_rollout": 8, "samples_per_prompt": 4}
pick = module_of_the_engine._pick


class Wrong(TransformersEngine):
    """A real engine whose completions are changed on their way out: ``change(generation, settings)``."""

    def __init__(self, change, *, calls=math.inf, dtype="float32"):
        super().__init__(dtype=dtype)
        self.change = change

    async def generate(self, prompt_ids, params, **settings):
        generation = await super().generate(prompt_ids, params, **settings)
        return self.change(generation)


def fit(tmp_path, engine, *, epochs=1, model=None, callbacks=(), doctor=None, **settings):
    doctor = doctor or RunDoctor(report=False, canary_tokens=0)
    run = trainer(tmp_path, callbacks=[doctor, *callbacks], max_epochs=epochs)
    module = GRPOModule(**{**MODEL, **(model or {})})
    run.fit(module, data(engine, **{**SETTINGS, **settings}))
    return doctor, run


def part_of(doctor):
    return next(part for part in doctor._parts if isinstance(part, SamplingExamination))


def cause_of(tmp_path, engine, canary_tokens=0, **settings):
    """The root cause with which a run ends before its first rollout."""
    doctor = RunDoctor(report=False, canary_tokens=canary_tokens)
    with pytest.raises(DegeneracyError) as error:
        fit(tmp_path, engine, doctor=doctor, **settings)
    failed = [v for v in doctor.verdicts if v.cause and v.message in str(error.value)]
    assert part_of(doctor).facts()["surprisal"] == [], "nothing was trained on"
    return failed[0].cause, str(error.value)


def logprobs(function):
    return lambda generation: replace(generation, logprobs=tuple(function(list(generation.logprobs))))


def settings_changed(monkeypatch, **changes):
    """The engine samples with other settings than it is asked to."""

    def sampled(logits, params, generators):
        return pick(logits, replace(params, **changes), generators)

    monkeypatch.setattr(module_of_the_engine, "_pick", sampled)


def raw(monkeypatch):
    def sampled(logits, params, generators):
        tokens, _ = pick(logits, params, generators)
        return tokens, logits.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)

    monkeypatch.setattr(module_of_the_engine, "_pick", sampled)


def truncated(monkeypatch, top_p):
    def sampled(logits, params, generators):
        probs, order = (logits.float() / params.temperature).softmax(-1).sort(-1, descending=True)
        cut = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, probs.cumsum(-1) - probs >= top_p)
        return pick(logits.float().masked_fill(cut, -torch.inf), params, generators)

    monkeypatch.setattr(module_of_the_engine, "_pick", sampled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_healthy_run_is_silent(tiny_model, tmp_path, dtype):
    engine = TransformersEngine(dtype=dtype)
    doctor, run = fit(tmp_path, engine, epochs=4, model={"model": tiny_model, "dtype": dtype}, temperature=0.7)
    assert run.global_step == 4
    facts = part_of(doctor).facts()
    assert [entry["update"] for entry in facts["surprisal"]] == [0, 1, 2, 3]
    assert all(abs(entry["z"]) < 5 for entry in facts["surprisal"])
    assert part_of(doctor).noise_floor < 0.02
    assert sum(facts["log_ratio_histograms"]["by_k"]["0"]) > 500
    if dtype == "float32":
        assert facts["attribution"]["noise"] == pytest.approx(1)


def test_what_long_runs_leave_is_thinned(tiny_model, tmp_path, monkeypatch):
    for part in (sampling, rollout):
        monkeypatch.setattr(part, "Curve", partial(Curve, limit=4))
    doctor, _ = fit(tmp_path, TransformersEngine(dtype="float32"), model={"model": tiny_model}, epochs=8)
    facts = {part.name: part.facts() for part in doctor._parts}
    assert [entry["update"] for entry in facts["sampling"]["surprisal"]] == [0, 2, 4, 6, 7]
    assert [entry["number"] for entry in facts["rollout"]["rollouts"]] == [0, 2, 4, 6, 7]
    resumed = SamplingExamination(max_mismatch=1.0)
    resumed.load_state_dict(part_of(doctor).state_dict())
    assert resumed.facts()["surprisal"] == facts["sampling"]["surprisal"]


def computes(monkeypatch, change):
    """The policy computes on another batch than the one it is given."""
    right = Policy.token_logprobs
    monkeypatch.setattr(Policy, "token_logprobs", lambda self, batch, **options: right(self, change(batch), **options))


def late(batch):
    return batch.replace(position_ids=batch.position_ids + (batch.sequence_ids != PROMPT))


def neighbouring(batch):
    return batch.replace(target_index=(batch.target_index + 1).clamp(max=batch.num_tokens - 1))


@pytest.mark.parametrize("canary_tokens", [0, 64])
@pytest.mark.parametrize("change", [late, neighbouring])
def test_the_trainers_own_forward_pass(tiny_model, tmp_path, monkeypatch, change, canary_tokens):
    computes(monkeypatch, change)
    engine = TransformersEngine(dtype="float32")
    cause, text = cause_of(tmp_path, engine, model={"model": tiny_model}, canary_tokens=canary_tokens)
    assert cause == "wrong_forward"
    assert "packed forward pass and the plain one disagree" in text


def test_samples_that_see_each_other(tiny_model, tmp_path, monkeypatch):
    def leaking(batch):
        return batch.replace(sequence_ids=torch.where(batch.sequence_ids == PROMPT, PROMPT, batch.row_ids))

    right = grpo_lightning.policy.attention_plan
    monkeypatch.setattr(grpo_lightning.policy, "attention_plan", lambda batch: right(leaking(batch)))
    cause, _ = cause_of(tmp_path, TransformersEngine(dtype="float32"), model={"model": tiny_model})
    assert cause == "wrong_forward"


@pytest.mark.parametrize("canary_tokens", [0, 64])
def test_logprobs_of_the_trainer_that_are_no_numbers(tiny_model, tmp_path, monkeypatch, canary_tokens):
    right = Policy.token_logprobs

    def broken(policy, batch, **options):
        result = right(policy, batch, **options)
        bad = torch.arange(len(result.logprobs)) % 50 == 3
        return result._replace(logprobs=torch.where(bad, torch.nan, result.logprobs))

    monkeypatch.setattr(Policy, "token_logprobs", broken)
    engine = TransformersEngine(dtype="float32")
    cause, text = cause_of(tmp_path, engine, model={"model": tiny_model}, canary_tokens=canary_tokens)
    assert cause == "not_finite"
    assert "of the trainer are NaN or infinite, before any update" in text


def test_raw_logprobs(tiny_model, tmp_path, monkeypatch):
    raw(monkeypatch)
    engine = TransformersEngine(dtype="float32")
    cause, text = cause_of(tmp_path, engine, model={"model": tiny_model}, temperature=0.7)
    assert cause == "raw_logprobs"
    assert "raw logprobs, at temperature 1" in text
    assert "processed_logprobs" in text


def test_raw_logprobs_at_temperature_1_are_right(tiny_model, tmp_path, monkeypatch):
    raw(monkeypatch)
    _, run = fit(tmp_path, TransformersEngine(dtype="float32"), model={"model": tiny_model}, temperature=1.0)
    assert run.global_step == 1


@pytest.mark.parametrize(("declared", "real"), [(0.7, 1.0), (1.0, 0.8), (1.0, 1.15)])
def test_another_temperature(tiny_model, tmp_path, monkeypatch, declared, real):
    settings_changed(monkeypatch, temperature=real)
    engine = TransformersEngine(dtype="float32")
    cause, text = cause_of(tmp_path, engine, model={"model": tiny_model}, temperature=declared)
    assert cause == "wrong_temperature"
    found = float(text.split("temperature that fits: ")[1].split()[0])
    assert found == pytest.approx(real, rel=0.05)


def test_a_trainer_that_forgets_the_temperature(tiny_model, tmp_path, monkeypatch):
    right = Policy.token_logprobs
    monkeypatch.setattr(
        Policy, "token_logprobs", lambda self, batch, **options: right(self, batch.replace(temperature=1.0), **options)
    )
    engine = TransformersEngine(dtype="float32")
    cause, text = cause_of(tmp_path, engine, model={"model": tiny_model}, temperature=0.7)
    assert cause == "wrong_temperature"
    assert "The trainer computes its logprobs at a temperature of about 1, but samples are drawn at 0.7" in text


@pytest.mark.parametrize("top_p", [0.9, 0.98])
def test_top_p(tiny_model, tmp_path, monkeypatch, top_p):
    truncated(monkeypatch, top_p)
    cause, text = cause_of(tmp_path, TransformersEngine(dtype="float32"), model={"model": tiny_model})
    assert cause == "truncated_sampling"
    assert f"top_p = {top_p}" in text


@pytest.mark.parametrize(
    ("change", "cause", "words"),
    [
        (lambda s: [s[0], *s[:-1]], "shifted_logprobs", "shifted by 1 forwards"),
        (lambda s: [*s[2:], s[-1], s[-1]][: len(s)], "shifted_logprobs", "shifted by 2 backwards"),
        (lambda s: s[::-1], "shifted_logprobs", "in reverse"),
        (lambda s: [0.0] * len(s), "logprobs_zero", "are all 0"),
        (lambda s: [-1.5] * len(s), "logprobs_constant", "are all -1.5"),
        (lambda s: [sum(s) / len(s)] * len(s), "logprobs_constant", "mean logprob"),
        (lambda s: [math.nan, *s[1:]], "logprobs_missing", "no logprob, or NaN, for 16 of"),
        (lambda s: [None] * len(s), "logprobs_missing", "no logprob"),
        (lambda s: [], "logprobs_missing", "no logprob"),
        (lambda s: [x / math.log(2) for x in s], "logprob_units", "base 2"),
        (lambda s: [x - 0.3 * (i % 2) for i, x in enumerate(s)], "mismatch", "disagree about the probability"),
    ],
)
def test_logprobs_that_mean_something_else(tiny_model, tmp_path, change, cause, words):
    found, text = cause_of(tmp_path, Wrong(logprobs(change)), model={"model": tiny_model})
    assert found == cause
    assert words in text


def test_forced_tokens_with_filled_in_logprobs(tiny_model, tmp_path):
    def force(generation):
        tokens, s = list(generation.token_ids), list(generation.logprobs)
        tokens[-1], s[-1] = 17, 0.0
        return replace(generation, token_ids=tuple(tokens), logprobs=tuple(s))

    cause, text = cause_of(tmp_path, Wrong(force), model={"model": tiny_model})
    assert cause == "forced_in_mask"
    assert "the policy did not choose them" in text


class Serves(TransformersEngine):
    """Loads another adapter than the published one from version 2 on: ``change(name, tensor)`` of each matrix."""

    def __init__(self, change=None, *, stale=False):
        super().__init__(dtype="float32")
        self.change, self.stale, self.last = change, stale, None

    def load_adapter(self, ref):
        path = ref.path
        if ref.version >= 2:
            path = self.copy(ref.path, self.last if self.stale else ref.path)
        self.last = self.copy(ref.path, ref.path)
        super().load_adapter(replace(ref, path=path))

    def copy(self, like, weights):
        copied = Path(tempfile.mkdtemp(dir=like.parent))
        shutil.copytree(like, copied, dirs_exist_ok=True)
        tensors = load_file(weights / "adapter_model.safetensors")
        if self.change is not None and not self.stale:
            tensors = {name: self.change(name, tensor) for name, tensor in tensors.items()}
        save_file(tensors, copied / "adapter_model.safetensors")
        return copied


def only_b(factor, family=""):
    return lambda name, tensor: tensor * factor if "lora_B" in name and family in name else tensor


@pytest.mark.parametrize(
    ("engine", "cause", "words"),
    [
        (Serves(stale=True), "sync_stale", "the weights of the previous rollout"),
        (Serves(only_b(0.0)), "adapter_ignored", "the base model"),
        (Serves(only_b(0.5)), "adapter_scale", "another scale"),
        (Serves(only_b(2.0)), "adapter_scale", "another scale"),
        (Serves(only_b(0.0, "down_proj")), "adapter_partial", "the adapter without down_proj"),
        (Serves(only_b(0.0, "v_proj")), "adapter_partial", "the adapter without v_proj"),
    ],
)
def test_other_weights_are_named_in_training(tiny_model, tmp_path, engine, cause, words):
    with pytest.raises(DegeneracyError):
        fit(
            tmp_path,
            engine,
            epochs=4,
            model={"model": tiny_model, "learning_rate": 0.02},
            doctor=(doctor := RunDoctor(report=False, canary_tokens=0)),
        )
    found = next(v for v in doctor.verdicts if v.check == "logprob semantics")

    assert found.cause == cause
    assert words in found.message
    assert part_of(doctor).facts()["attribution"]["staleness"] > 0.8


class Seen(Callback):
    """The verdicts before each step."""

    def __init__(self, doctor):
        self.doctor, self.verdicts = doctor, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.verdicts += self.doctor.verdicts


def test_dropout_is_no_mismatch(tiny_model, tmp_path):
    model = {"model": tiny_model, "learning_rate": 0.02, "lora_dropout": 0.3}
    doctor = RunDoctor(report=False, canary_tokens=0)
    seen = Seen(doctor)
    _, run = fit(tmp_path, TransformersEngine(dtype="float32"), epochs=4, model=model, doctor=doctor, callbacks=[seen])
    assert run.global_step == 4
    last = [v for v in seen.verdicts if v.check == "mismatch"][-1]
    assert last.evidence["mismatch RMS"] > 10 * last.evidence["allowed"]
    assert last.evidence["mismatch RMS without dropout"] < 1e-5


class OneReplicaBehind(TransformersEngine):
    """Answers requests for the last prompts of a rollout with other logprobs, as a replica with old weights would."""

    def __init__(self):
        super().__init__(dtype="float32")
        self.asked = []

    async def generate(self, prompt_ids, params, **settings):
        generation = await super().generate(prompt_ids, params, **settings)
        if tuple(prompt_ids) not in self.asked:
            self.asked.append(tuple(prompt_ids))
        if self.policy_version >= 2 and self.asked.index(tuple(prompt_ids)) % 8 >= 4:
            generation = replace(generation, logprobs=tuple(value - 0.1 for value in generation.logprobs))
        return generation


@pytest.mark.parametrize("dropout", [0.0, 1e-6])
def test_tokens_that_agree_do_not_excuse_others(tiny_model, tmp_path, monkeypatch, dropout):
    monkeypatch.setattr(ratio, "_BASE_TOKENS", 1)
    model = {"model": tiny_model, "learning_rate": 0.02, "lora_dropout": dropout}
    with pytest.raises(DegeneracyError):
        fit(
            tmp_path,
            OneReplicaBehind(),
            epochs=4,
            model=model,
            doctor=(doctor := RunDoctor(report=False, canary_tokens=0)),
        )
    assert "other_weights" in {v.cause for v in doctor.verdicts if v.check == "mismatch"}

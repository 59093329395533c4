import logging
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from runs import MODEL, data, length, trainer

from grpo_lightning import GRPOModule, RolloutDataModule, TransformersEngine
from grpo_lightning.callbacks import RatioDegeneracyDetector, RunDoctor
from grpo_lightning.diagnostics import Status, Verdict
from grpo_lightning.diagnostics.examination import Examination
from grpo_lightning.errors import ConfigurationError, DegeneracyError, RatioDegeneracyError
from grpo_lightning.tasks import SumTasks


class Claims(Examination):
    """A part that finds what it is told to, at each update."""

    name = "claims"

    def __init__(self, *causes):
        self.causes = list(causes)

    def on_update(self, run, update):
        causes = (self.causes.pop(0) if self.causes else None) or ""
        return [Verdict("gradient", Status.FAIL, f"found {cause}", cause=cause) for cause in causes.split()]


def doctor_with(*causes, **settings):
    class Doctor(RunDoctor):
        def _further_parts(self):
            return (Claims(*causes),)

    return Doctor(**settings)


def fit(tmp_path, model, doctor, **settings):
    run = trainer(tmp_path, callbacks=[doctor], **{"max_epochs": 3, **settings})
    run.fit(GRPOModule(model, **MODEL), data(TransformersEngine(dtype="float32")))
    return run


def test_a_failure_halts_before_the_step(tmp_path, tiny_model):
    doctor = doctor_with(None, "wrong_sign")
    with pytest.raises(DegeneracyError, match="found wrong_sign") as error:
        fit(tmp_path, tiny_model, doctor)
    assert not isinstance(error.value, RatioDegeneracyError)
    assert "Checks passed: finite, finite gradient, old logprobs" in str(error.value)


def test_a_warning_is_said_once_and_named_when_the_run_halts(tmp_path, tiny_model):
    doctor = doctor_with("wrong_scale", "wrong_scale", "wrong_sign", reactions={"wrong_scale": "warn"})
    with (
        pytest.warns(UserWarning, match="found wrong_scale") as warned,
        pytest.raises(DegeneracyError, match="Found earlier in this run.*the gradient has the wrong size"),
    ):
        fit(tmp_path, tiny_model, doctor)
    assert sum("found wrong_scale" in str(w.message) for w in warned) == 1


def test_a_cause_that_lasts_hides_no_later_one(tmp_path, tiny_model):
    both = "tasks_repeated template"
    doctor = doctor_with("tasks_repeated", both, both, reactions={"all": "warn"})
    with pytest.warns(UserWarning, match="found") as warned:
        fit(tmp_path, tiny_model, doctor)
    said = [str(w.message) for w in warned if "found" in str(w.message)]
    assert [text.splitlines()[0] for text in said] == ["found tasks_repeated", "found template"]
    assert "Found earlier in this run, and perhaps the reason: every rollout draws the same tasks" in said[1]


def test_what_is_only_logged_stops_nothing(tmp_path, tiny_model, caplog):
    with caplog.at_level(logging.INFO, logger="grpo_lightning.callbacks.run_doctor"):
        run = fit(tmp_path, tiny_model, doctor_with("wrong_sign", reactions={"all": "log"}))
    assert run.global_step == 3
    assert "found wrong_sign" in caplog.text


@pytest.mark.parametrize(
    ("reactions", "message"),
    [
        ({"wrong_sing": "warn"}, "expected reactions by cause or check, but got 'wrong_sing'; known: .*wrong_sign"),
        ({"wrong_sign": "stop"}, "expected the reactions halt, warn, log, but got stop"),
    ],
)
def test_unknown_reactions_are_refused(reactions, message):
    with pytest.raises(ConfigurationError, match=message):
        RunDoctor(reactions=reactions)


def test_the_detector_has_none_of_the_further_parts():
    assert [part.name for part in RatioDegeneracyDetector()._parts] == ["ratio"]


class Zeros(TransformersEngine):
    async def generate(self, prompt_ids, params, **settings):
        generation = await super().generate(prompt_ids, params, **settings)
        if settings["seed"] % 2:
            return generation
        return replace(generation, logprobs=(0.0,) * len(generation.logprobs))


def test_zeros_are_found_where_the_engine_may_agree_bit_for_bit(tmp_path, tiny_model):
    run = trainer(tmp_path, callbacks=[RatioDegeneracyDetector(bitwise_consistent_engine=True, max_mismatch=100)])
    with pytest.raises(DegeneracyError, match="were filled in with zeros"):
        run.fit(GRPOModule(tiny_model, **MODEL), data(Zeros(dtype="float32"), max_tokens=16))


class Copied(RolloutDataModule):
    """From some rollout on, the stored logprobs are the trainer's, bit for bit."""

    def __init__(self, *args, first, **settings):
        super().__init__(*args, **settings)
        self.first = first

    def _cut(self, origin, groups, module, record=None):
        rollouts = super()._cut(origin, groups, module, record)
        if origin.number >= self.first:
            for rollout in rollouts:
                for batch in rollout.batches:
                    with torch.no_grad():
                        batch.old_logprobs.copy_(module.policy.token_logprobs(batch).logprobs)
                    rollout.stored[batch.ledger_index] = batch.old_logprobs.double()
        return rollouts


@pytest.mark.parametrize("first", [0, 1])
def test_only_an_engine_that_never_differed_is_called_a_copy(tmp_path, tiny_model, first):
    """Logprobs of a collapsed policy are so large that two programs may round them to the same."""
    run = trainer(tmp_path, callbacks=[RatioDegeneracyDetector()], max_epochs=3)
    settings = {"prompts_per_rollout": 4, "samples_per_prompt": 3, "max_tokens": 12, "max_prompt_tokens": 64}
    copied = Copied(SumTasks(5), length, engine=TransformersEngine(dtype="float32"), first=first, **settings)
    with nullcontext() if first else pytest.raises(DegeneracyError, match="equal the trainer's bit for bit"):
        run.fit(GRPOModule(tiny_model, **MODEL), copied)
    assert run.global_step == (3 if first else 0)


class Slow(Examination):
    """A part that takes its time at every moment."""

    name = "slow"
    seconds = 0.4

    def on_sync(self, run):
        time.sleep(self.seconds)
        return ()

    def on_rollout(self, run, rollout):
        time.sleep(self.seconds)
        return ()

    def before_step(self, run, update, optimizer):
        time.sleep(self.seconds)

    def after_step(self, run, update, step):
        time.sleep(self.seconds)
        return ()


def test_the_doctors_time_is_its_own(tmp_path, tiny_model):
    class Doctor(RunDoctor):
        def _further_parts(self):
            return (Slow(),)

    class Epochs(Callback):
        def __init__(self):
            self.metrics, self.seconds, self.last = [], [], 0.0

        def on_train_start(self, trainer, pl_module):
            self.last = time.perf_counter()

        def on_train_epoch_end(self, trainer, pl_module):
            now = time.perf_counter()
            self.metrics.append(pl_module.epoch_metrics())
            self.seconds.append(now - self.last)
            self.last = now

    epochs = Epochs()
    run = trainer(tmp_path, callbacks=[Doctor(), epochs], max_epochs=3)
    run.fit(GRPOModule(tiny_model, **MODEL), data(TransformersEngine(dtype="float32")))
    assert float(run.callback_metrics["time/doctor_seconds"]) == pytest.approx(
        epochs.metrics[-1]["time/doctor_seconds"]
    )
    for number, metrics in enumerate(epochs.metrics):
        assert metrics["time/doctor_seconds"] >= 4 * Slow.seconds, number
        if number:
            parts = [metrics[f"time/{name}_seconds"] for name in ("rollout", "train", "sync", "doctor")]
            assert sum(parts) <= epochs.seconds[number] + 0.01, "counted twice"

"""What a run leaves behind of its doctor, however it ends."""

import csv
import errno
import json
from pathlib import Path

import pytest
from fakes import FakeEngine
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import MODEL, data

from grpo_lightning import GRPOModule
from grpo_lightning.callbacks import RatioDegeneracyDetector, RunDoctor, RunSummary
from grpo_lightning.diagnostics import Status, Verdict
from grpo_lightning.diagnostics.examination import Examination
from grpo_lightning.errors import DegeneracyError


class Doctor(RunDoctor):
    """Only what is registered here examines; the fake engine's logprobs are random numbers."""

    def __init__(self, *parts, **settings):
        super().__init__(**settings)
        self._parts = parts


class Part(Examination):
    """Finds a fault at one update."""

    name = "part"

    def __init__(self, faulty=None, cause="mismatch"):
        self._faulty, self._cause = faulty, cause

    def facts(self):
        return {"series": [{"update": 0, "value": float("nan")}]}

    def on_update(self, run, update):
        if run.trainer.global_step != self._faulty:
            return [Verdict("mismatch", Status.PASS)]
        evidence = {"difference": float("inf")}
        return [Verdict("mismatch", Status.FAIL, "They differ.", "Look.", evidence, self._cause)]


def fit(model, folder, doctor, *, callbacks=(), epochs=2, ckpt_path=None, **settings):
    settings = {"logger": CSVLogger(folder, name="runs", version="one")} | settings
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[doctor, *callbacks],
        **settings,
    )
    trainer.fit(GRPOModule(model, **MODEL), data(FakeEngine(), updates_per_rollout=2), ckpt_path=ckpt_path)
    return trainer


def record(folder):
    text = (folder / "doctor.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_run_leaves_its_record_and_page(tiny_model, tmp_path, capsys):
    fit(tiny_model, tmp_path, Doctor(Part()), callbacks=[RunSummary(plot=False)])
    run = tmp_path / "runs" / "one"
    found = record(run)
    assert found["diagnosis"] is None
    assert found["run"]["model"] == str(tiny_model)
    assert (found["run"]["epochs"], found["run"]["updates"], found["run"]["ended_by"]) == (2, 4, "")
    (check,) = found["checks"]
    assert (check["check"], check["passed"], check["first_update"], check["last_update"]) == ("mismatch", 4, 0, 3)
    assert found["curves"]["updates"]["update"] == [0, 1, 2, 3]
    assert found["curves"]["epochs"]["epoch"] == [1, 2]
    assert len(found["curves"]["epochs"]["reward/mean"]) == 2
    assert {"ppo/ratio_std", "policy/entropy", "ppo/clip_fraction_low", "policy/grad_norm"} <= set(
        found["curves"]["updates"]
    )
    assert found["parts"] == {"part": {"series": [{"update": 0, "value": "nan"}]}}
    assert found["settings"]["thresholds"]["z"] == 5.3
    assert "torch" in found["versions"]
    assert "No failure was found." in (run / "doctor.html").read_text(encoding="utf-8")
    assert f"Doctor:      {run / 'doctor.html'}" in capsys.readouterr().out


def test_numbers_by_update_are_those_that_were_logged(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, Doctor(Part()))
    curves = record(tmp_path / "runs" / "one")["curves"]
    with (tmp_path / "runs" / "one" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["policy/grad_norm"]]
    for name in ("policy/grad_norm", "ppo/ratio_std"):
        assert curves["updates"][name] == pytest.approx([float(row[name]) for row in steps], rel=1e-5)
    epochs = [row for row in rows if row["policy/entropy"]]
    assert curves["epochs"]["policy/entropy"] == pytest.approx([float(row["policy/entropy"]) for row in epochs])
    for name in ("policy/entropy", "ppo/kl_k3"):
        # Both updates of an epoch weigh about the same.
        mean = sum(curves["updates"][name][:2]) / 2
        assert curves["epochs"][name][0] == pytest.approx(mean, rel=0.3)


def test_a_halted_run_leaves_the_text_of_its_exception(tiny_model, tmp_path):
    with pytest.raises(DegeneracyError) as error:
        fit(tiny_model, tmp_path, Doctor(Part(faulty=1)))
    found = record(tmp_path / "runs" / "one")
    assert found["diagnosis"]["text"] == str(error.value)
    assert found["diagnosis"]["cause"] == "mismatch"
    assert found["diagnosis"]["evidence"] == {"difference": "inf"}
    assert (found["diagnosis"]["update"], found["diagnosis"]["passed_update"]) == (1, 0)
    assert 0 < found["diagnosis"]["hours_lost"] < found["run"]["seconds"] / 3600
    assert found["run"]["ended_by"] == "DegeneracyError"
    assert found["curves"]["updates"]["update"] == [0, 1]
    page = (tmp_path / "runs" / "one" / "doctor.html").read_text(encoding="utf-8")
    assert "Trainer and engine disagree and no known cause explains it." in page


class Interrupt(Callback):
    def on_train_batch_end(self, *args):
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_a_report(tiny_model, tmp_path):
    with pytest.raises(SystemExit):
        fit(tiny_model, tmp_path, Doctor(Part()), callbacks=[Interrupt()])
    found = record(tmp_path / "runs" / "one")
    assert found["run"]["ended_by"] == "KeyboardInterrupt"
    assert found["curves"]["updates"]["update"] == [0]


def test_a_full_disk_is_a_warning(tiny_model, tmp_path, monkeypatch):
    write = Path.write_text

    def full(path, *args, **settings):
        if "doctor" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    with (
        pytest.raises(DegeneracyError, match="They differ"),
        pytest.warns(UserWarning, match="report could not be written: could not write .*doctor.json.*No space left"),
    ):
        fit(tiny_model, tmp_path, Doctor(Part(faulty=0)))
    assert list((tmp_path / "runs" / "one").glob("*doctor*")) == []


def test_facts_that_fail_are_a_warning(tiny_model, tmp_path):
    class Broken(Part):
        def facts(self):
            raise ZeroDivisionError("in the part")

    with pytest.warns(UserWarning, match="report could not be written: in the part"):
        fit(tiny_model, tmp_path, Doctor(Broken()))


def test_without_a_logger_it_stands_where_the_trajectories_would(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, Doctor(Part()), logger=False)
    assert record(tmp_path / "grpo_lightning_runs" / "version_0")["run"]["updates"] == 4


@pytest.mark.parametrize("doctor", [Doctor(Part(), report=False), RatioDegeneracyDetector(max_mismatch=100)])
def test_no_report_unless_wanted(tiny_model, tmp_path, doctor):
    fit(tiny_model, tmp_path, doctor, callbacks=[RunSummary(plot=False)])
    assert list(tmp_path.rglob("*doctor*")) == []


def test_fast_dev_run_writes_nothing(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, Doctor(Part()), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_goes_on_with_its_record(tiny_model, tmp_path):
    def checkpoints():
        return ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)

    fit(tiny_model, tmp_path, Doctor(Part(faulty=1), reactions={"all": "warn"}), callbacks=[checkpoints()])
    first = record(tmp_path / "runs" / "one")
    fit(
        tiny_model,
        tmp_path,
        Doctor(Part(), reactions={"all": "warn"}),
        callbacks=[checkpoints()],
        epochs=3,
        ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
        logger=CSVLogger(tmp_path, name="runs", version="two"),
    )
    second = record(tmp_path / "runs" / "two")
    assert second["curves"]["updates"]["update"] == [0, 1, 2, 3, 4, 5]
    assert second["curves"]["epochs"]["epoch"] == [1, 2, 3]
    (check,) = second["checks"]
    assert (check["passed"], check["failed"], check["status"]) == (5, 1, "pass")
    assert second["diagnosis"] == first["diagnosis"]
    assert second["diagnosis"]["reaction"] == "warn"
    assert [change["status"] for change in second["timeline"]] == ["pass", "fail", "pass"]
    assert second["run"]["seconds"] > first["run"]["seconds"]

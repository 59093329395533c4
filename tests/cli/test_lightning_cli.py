"""Fit, validate and predict with one's own parts, and what stands in the way of a second run in the same place."""

import json
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from own_parts import OwnData, OwnEngine, OwnModule

from grpo_lightning import EpisodeSettings, GRPOModule, RolloutDataModule
from grpo_lightning.cli import main, run
from grpo_lightning.cli.guide import guide
from grpo_lightning.cli.lightning_cli import DATA, MODEL, run_lightning, settings_of
from grpo_lightning.errors import ConfigurationError


def parts(args):
    cli = run_lightning(["fit", *args], dispatch=False)
    return cli.model, cli.datamodule


def test_plain_settings_need_no_class(settings):
    module, data = parts([*settings, "--model.learning_rate", "3e-4", "--data.max_tokens=5"])
    assert type(module) is GRPOModule
    assert type(data) is RolloutDataModule
    assert module.hparams["learning_rate"] == 3e-4
    assert (data.max_tokens, data.seed) == (5, 1)


def test_own_classes_on_the_command_line(settings):
    module, data = parts(
        [
            *settings,
            "--model=own_parts.OwnModule",
            "--model.bonus=2.5",
            "--data=own_parts.OwnData",
            "--data.largest=5",
            "--data.engine=own_parts.OwnEngine",
            "--data.engine.speed=7",
            "--seed_everything=9",
        ]
    )
    assert isinstance(module, OwnModule)
    # The file's settings stay.
    assert (module.bonus, module.hparams["learning_rate"]) == (2.5, 1e-3)
    assert isinstance(data, OwnData)
    assert (len(data.tasks) + len(data.val_tasks), data.seed) == (36, 9)
    assert isinstance(data.engine, OwnEngine)
    assert data.engine.speed == 7


def test_own_classes_in_a_file_over_another(settings, folder):
    own = {
        "model": {"class_path": "own_parts.OwnModule", "init_args": {"bonus": 1.5}},
        "data": {
            "rewards": [{"class_path": "own_parts.OwnReward", "init_args": {"per_character": 0.1}}],
            "prompts_per_rollout": 4,
        },
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(own))
    module, data = parts([*settings, "-c", "own.yaml"])
    assert isinstance(module, OwnModule)
    assert (module.bonus, module.hparams["learning_rate"]) == (1.5, 1e-3)
    assert data.scorer.names == ("OwnReward",)
    assert (data.prompts_per_rollout, data.samples_per_prompt) == (4, 2)


def test_printed_settings_run(settings, folder, capsys):
    assert main(["fit", *settings, "--model.learning_rate=5e-4", "--print_config"]) == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    module, _ = parts(["-c", "printed.yaml"])
    assert module.hparams["learning_rate"] == 5e-4


def test_the_guide_names_settings_that_exist(settings):
    keys = {f"model.{s}" for s in settings_of(MODEL)} | {f"data.{s}" for s in settings_of(DATA)}
    keys |= {f"trainer.{s}" for s in settings_of("lightning.pytorch.Trainer")}
    keys |= {f"data.episodes.{field.name}" for field in fields(EpisodeSettings)}
    words = " ".join(guide(c) for c in ("fit", "validate", "predict")).replace(",", " ").split()
    named = {w.removeprefix("--") for w in words if w.startswith(("--data.", "--model.", "--trainer."))}
    examples = {"model.my_setting", "model.help", "data.engine.help", "data.predict_tasks.path"}
    assert len(named - examples) > 10
    assert named - examples <= keys


def test_help_of_ones_own_class(capsys):
    assert main(["fit", "--model.help", "own_parts.OwnModule"]) == 0
    assert "A setting of its own." in capsys.readouterr().out


@pytest.mark.slow
def test_the_complete_help_costs_about_what_lightnings_does(tmp_path):
    (tmp_path / "bare.py").write_text(
        "from lightning.pytorch import LightningDataModule, LightningModule\n"
        "from lightning.pytorch.cli import LightningCLI\n"
        "class M(LightningModule): pass\n"
        "class D(LightningDataModule): pass\n"
        "LightningCLI(M, D)\n"
    )

    def cpu_seconds(*command):
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, *command, "fit", "--help"], check=True, capture_output=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    # Processor time, the least of a few: other work on the machine changes it least.
    bare, ours = (min(cpu_seconds(*c) for _ in range(3)) for c in ([tmp_path / "bare.py"], ["-m", "grpo_lightning"]))
    assert ours < 1.5 * bare


class TestRunFolder:
    def test_a_second_run_in_it_is_refused_before_the_engine_starts(self, settings, folder, capsys):
        args = ["fit", *settings, "--trainer.max_epochs=1", "--trainer.logger.version=mine"]
        assert main(args) == 0
        kept = (folder / "runs/small run/mine/metrics.csv").read_text()
        capsys.readouterr()
        assert main(args) == 2
        message = "expected a new folder for this run, but runs/small run/mine already holds one"
        assert message in capsys.readouterr().err
        assert (folder / "runs/small run/mine/metrics.csv").read_text() == kept

    def test_evaluation_leaves_its_settings_alone(self, settings, folder):
        args = [*settings, "--trainer.logger.version=mine"]
        assert main(["fit", *args, "--trainer.max_epochs=1"]) == 0
        config = folder / "runs/small run/mine/config.yaml"
        trained = config.read_text()
        assert main(["validate", *args, "--ckpt_path=runs/small run/mine/checkpoints/last.ckpt"]) == 0
        assert config.read_text() == trained


def test_settings_given_now_win_over_those_in_the_checkpoint(settings):
    assert main(["fit", *settings, "--trainer.max_epochs=1"]) == 0
    checkpoint = "runs/small run/version_0/checkpoints/last.ckpt"
    cli = run(["validate", *settings, f"--ckpt_path={checkpoint}", "--model.learning_rate=7e-4"])
    assert cli.model.hparams["learning_rate"] == 7e-4
    assert cli.model.policy_version == 2


def test_predict_from_the_checkpoint(settings, folder, capsys):
    assert main(["fit", *settings, "--trainer.max_epochs=1"]) == 0
    (folder / "prompts.jsonl").write_text('{"prompt": "What is 1 + 1?"}\n{"prompt": "What is 2 + 2?"}\n')
    run_folder = "runs/small run/version_0"
    args = [
        "predict",
        *("-c", f"{run_folder}/config.yaml", "--ckpt_path", f"{run_folder}/checkpoints/last.ckpt"),
        *("--data.predict_tasks", "grpo_lightning.tasks.JsonlTasks", "--data.predict_tasks.path", "prompts.jsonl"),
    ]
    assert main(args) == 0
    (path,) = (folder / "runs").rglob("predictions.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["task"] for r in records] == ["1", "2"]
    assert {r["policy_version"] for r in records} == {2}
    assert f"Predictions: {path.relative_to(folder)}" in capsys.readouterr().out


def test_predict_without_prompts(settings, capsys):
    assert main(["predict", *settings]) == 2
    assert "predict needs tasks, but there are none; set predict_tasks" in capsys.readouterr().err


def test_a_failed_run_says_why_in_full(settings, capsys):
    assert main(["fit", *settings, "--data.rewards=[own_parts.text]"]) == 1
    error = capsys.readouterr().err
    assert "error: expected reward 'text' to return a finite number or None, but got 'good'" in error
    assert "Traceback" not in error


def test_ctrl_c_is_130(settings, monkeypatch, capsys):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(RolloutDataModule, "train_dataloader", interrupt)
    try:
        assert main(["fit", *settings]) == 130
    finally:
        # Lightning ignores ctrl-C from then on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_run_raises_instead_of_printing(settings):
    with pytest.raises(ConfigurationError, match="did you mean model.learning_rate"):
        run(["fit", *settings, "--model.lerning_rate=3"])

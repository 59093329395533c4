"""Everything but the run."""

import re
from pathlib import Path

import pytest
import torch

from grpo_lightning.cli import main
from grpo_lightning.cli.lightning_command import split_dry_run
from grpo_lightning.memory import estimate_memory
from grpo_lightning.module import GRPOModule


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-c", "a.yaml"], (False, None, ["-c", "a.yaml"])),
        (["--dry-run", "-c", "a.yaml"], (True, None, ["-c", "a.yaml"])),
        (["-c", "a.yaml", "--dry-run"], (True, None, ["-c", "a.yaml"])),
        (["--dry-run", "there", "-c", "a.yaml"], (True, Path("there"), ["-c", "a.yaml"])),
        (["-c", "a.yaml", "--dry-run=there"], (True, Path("there"), ["-c", "a.yaml"])),
    ],
)
def test_the_option(args, expected):
    assert split_dry_run(args) == expected


def test_it_says_what_the_run_would_be(settings, folder, capsys, monkeypatch):
    def no_weights(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(GRPOModule, "configure_model", no_weights)
    args = ["--trainer.accumulate_grad_batches=2", "--data.engine=grpo_lightning.VLLMEngine"]
    assert main(["fit", *settings, *args, "--dry-run", "checked"]) == 0
    out = capsys.readouterr().out
    assert (
        "2 prompts x 2 samples = 4 completions -> 2 updates of 2, each in 2 micro-batches; "
        "2 epochs = 4 updates, 8 completions"
    ) in out
    assert "Tasks:    439, 2 held out; the first prompt has " in out
    assert "Rewards:  one_is_longer" in out
    assert re.search(r"Memory:   trainer 0\.\d GiB at most \(micro-batches of 1 x 2 longest completions\), engine", out)
    assert "Run in:   runs/small run/version_0" in out
    assert "Settings: checked/config.yaml" in out
    assert not (folder / "runs").exists()


def test_what_has_no_estimate_is_no_mistake(settings, folder, capsys):
    assert main(["fit", *settings, "--model.attn_implementation=flash_attention_2", "--dry-run", "checked"]) == 0
    assert "Memory:   no estimate for this architecture (attention implementation 'flash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data.engine=grpo_lightning.TransformersEngine"], ("float32", "float32", False)),
        (
            ["--data.engine=grpo_lightning.TransformersEngine", "--data.engine.dtype=bfloat16"],
            ("float32", "bfloat16", False),
        ),
        (["--data.engine=grpo_lightning.VLLMEngine", "--data.engine.dtype=float16"], ("float32", "float16", False)),
        (["--trainer.precision=bf16-true"], ("bfloat16", "float32", False)),
        (
            [
                "--data.engine=grpo_lightning.TransformersEngine",
                "--model.full_finetuning=true",
                "--model.kl_coef=0.1",
            ],
            ("float32", "float32", True),
        ),
    ],
)
def test_the_estimate_is_of_the_runs_own_settings(settings, folder, args, expected, monkeypatch):
    seen = []

    def noted(*parts, **given):
        seen.append((given["dtype"], given["engine_dtype"], given["hold_reference"]))
        return estimate_memory(*parts, **given)

    monkeypatch.setattr("grpo_lightning.cli.dry_run.estimate_memory", noted)
    assert main(["fit", *settings, *args, "--dry-run", "checked"]) == 0
    dtype, engine_dtype, hold_reference = expected
    assert seen == [(getattr(torch, dtype), getattr(torch, engine_dtype), hold_reference)]


def test_the_resolved_settings_run(settings, folder):
    assert main(["fit", *settings, "--dry-run", "checked", "--trainer.max_epochs=1"]) == 0
    assert main(["fit", "-c", "checked/config.yaml"]) == 0
    assert (folder / "runs/small run/version_0/checkpoints/last.ckpt").exists()


def test_a_folder_of_its_own_by_default(settings, folder, capsys):
    assert main(["fit", *settings, "--dry-run"]) == 0
    (written,) = (folder / "runs").glob("dry-run-*/config.yaml")
    assert f"Settings: {written.relative_to(folder)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--data.updates_per_rollout=4", "use --data.updates_per_rollout 2"),
        ("--data.rewards=[own_parts.wants_difficulty]", "reward 'wants_difficulty' asks for 'difficulty'"),
        ("--data.max_prompt_tokens=3", "expected a prompt of 1 to 3 tokens"),
        ("--trainer.reload_dataloaders_every_n_epochs=2", "expected Trainer(reload_dataloaders_every_n_epochs=1)"),
        ("--model.full_finetuning=true", "expected an engine that takes whole models with full_finetuning"),
        ("--data.order=own_parts.beyond", "expected the order beyond to return"),
        ("--data.engine=own_parts.PickyEngine", "expected lora_rank <= 8, but got 16"),
    ],
)
def test_what_could_not_work_is_refused(settings, folder, setting, message, capsys):
    assert main(["fit", *settings, setting, "--dry-run", "checked"]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "checked").exists()


def test_earlier_settings_are_not_overwritten(settings, folder, capsys):
    assert main(["fit", *settings, "--dry-run", "checked"]) == 0
    assert main(["fit", *settings, "--dry-run", "checked"]) == 2
    assert "expected a new file for the settings, but checked/config.yaml exists already" in capsys.readouterr().err


def test_an_environment_may_begin_the_prompts(settings, folder, capsys):
    tasks = ["--data.tasks=grpo_lightning.tasks.SeedTasks", "--data.tasks.size=9", "--data.environment=games.Echo"]
    assert main(["fit", *settings, *tasks, "--dry-run", "checked"]) == 0
    out = capsys.readouterr().out
    assert "Tasks:    7, 2 held out; environments begin their prompts and play at most" in out
    assert "Rewards:  the environment's, one_is_longer" in out

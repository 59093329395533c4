"""The presets of algorithms: layers over any configuration."""

import inspect
import re
from pathlib import Path

import own_parts
import pytest
import yaml

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.cli import main
from grpo_lightning.cli.lightning_cli import run_lightning

CONFIGS = Path(__file__).parent.parent.parent / "configs"
PRESETS = sorted((CONFIGS / "algorithms").glob("*.yaml"))
BASES = [CONFIGS / "demo_cpu.yaml", CONFIGS / "existing_adapter.yaml"]
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--data.engine=fakes.FakeEngine"]

LEFT_TO_THE_BASE = {
    # Model, engine, learning rate.
    *(
        "self",
        "model",
        "adapter",
        "full_finetuning",
        "dtype",
        "attn_implementation",
        "gradient_checkpointing",
        "torch_compile",
    ),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    *("learning_rate", "weight_decay", "warmup_updates", "lr_schedule"),
    # Tasks, rewards, sizes.
    *("tasks", "rewards", "environment", "episodes", "engine", "engine_restarts", "val_tasks", "val_size"),
    *("prompts_per_rollout", "samples_per_prompt", "updates_per_rollout", "inner_epochs", "max_tokens"),
    *("max_prompt_tokens", "system_prompt", "chat_template", "chat_template_args", "plain_prompts", "temperature"),
    *("top_p", "top_k", "rollouts_ahead"),
    *("stop", "bad_words", "reward_weights", "reward_timeout", "reward_errors", "success_reward", "val_batch_size"),
    *("predict_tasks", "predict_samples", "predict_temperature", "val_samples", "val_temperature", "order", "seed"),
}
ONLY_WITH_A_TARGET = {"kl_horizon", "entropy_step", "entropy_max"}
"""Settings that mean nothing while their target is not set."""


def of(cls):
    return set(inspect.signature(cls.__init__).parameters) - LEFT_TO_THE_BASE - ONLY_WITH_A_TARGET


def read(path):
    return yaml.safe_load(path.read_text())


def header(path):
    lines = path.read_text().splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def made(model, *layers):
    """Module and data module of layered files."""
    files = [argument for path in layers for argument in ("-c", str(path))]
    return run_lightning(["fit", *files, f"--model.model={model}", "--model.adapter=null", *CPU], dispatch=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_header_names_the_source_and_where_the_preset_departs_from_it(preset):
    text = "\n".join(header(preset))
    assert re.search(r"^# Paper: (.|\n)*https://", text, flags=re.MULTILINE)
    assert re.search(r"^# Departs: \w", text, flags=re.MULTILINE)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_setting_of_the_algorithm_is_stated(preset):
    content = read(preset)
    assert set(content) == {"model", "data"}
    model, data = set(content["model"]), set(content["data"])
    assert model - ONLY_WITH_A_TARGET == of(GRPOModule)
    assert data - {"updates_per_rollout", "inner_epochs"} == of(RolloutDataModule)
    assert (content["model"]["entropy_target"] is not None) == ({"entropy_step", "entropy_max"} <= model)
    if content["model"]["surrogate"] == "reinforce":
        once = {"updates_per_rollout": 1, "inner_epochs": 1}
        assert once.items() <= content["data"].items(), "without a ratio a second update would be blind"


def test_the_rule_covers_all_settings():
    assert len(of(GRPOModule)) == 18
    assert len(of(RolloutDataModule)) == 5


@pytest.mark.parametrize("number", range(len(PRESETS)), ids=[path.stem for path in PRESETS])
def test_a_preset_gives_its_algorithm_over_any_base_and_any_other_preset(folder, tiny_model, number):
    preset, other = PRESETS[number], PRESETS[number - 5]
    wanted = read(preset)
    for base, *layers in ((BASES[0], preset), (BASES[1], other, preset)):
        cli = made(tiny_model, base, *layers)
        assert {name: cli.model.hparams[name] for name in wanted["model"]} == wanted["model"]
        data = cli.config["fit"]["data"]["init_args"]
        assert {name: data[name] for name in wanted["data"]} == wanted["data"]
        assert cli.datamodule.advantages.name == wanted["data"]["advantage"]
        assert cli.model.hparams["learning_rate"] == read(base)["model"]["learning_rate"]


def test_a_preset_in_a_dry_run(folder, tiny_model, capsys):
    files = ["-c", str(BASES[0]), "-c", str(CONFIGS / "algorithms" / "dapo.yaml")]
    assert main(["fit", *files, f"--model.model={tiny_model}", *CPU, "--dry-run", "checked"]) == 0
    assert "Settings: checked/config.yaml" in capsys.readouterr().out
    saved = read(folder / "checked" / "config.yaml")
    assert saved["model"]["init_args"]["clip_high"] == 0.28
    assert saved["data"]["init_args"]["max_refills"] == 9
    assert saved["data"]["init_args"]["val_size"] == read(BASES[0])["data"]["val_size"]


def test_a_setting_of_the_command_line_wins_over_a_preset(folder, tiny_model, capsys):
    files = ["-c", str(BASES[0]), "-c", str(CONFIGS / "algorithms" / "dapo.yaml")]
    assert main(["fit", *files, f"--model.model={tiny_model}", "--data.overlong_buffer=4", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["overlong_buffer"] == 4


def test_a_surrogate_of_ones_own(folder, tiny_model, capsys):
    own = ["--model.surrogate=own_parts.unclipped", "--model.surrogate_args={scale: 2.0}"]
    arguments = ["fit", "-c", str(BASES[0]), f"--model.model={tiny_model}", *CPU, *own]
    assert main([*arguments, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (printed["surrogate"], printed["surrogate_args"]) == ("own_parts.unclipped", {"scale": 2.0})
    assert main([*arguments, "--dry-run", "checked"]) == 0
    again = made(tiny_model, folder / "checked" / "config.yaml")
    assert again.model.objective.surrogate.func is own_parts.unclipped
    assert again.model.objective.surrogate.keywords == {"scale": 2.0}


def test_a_wrong_setting_of_a_surrogate_of_ones_own(folder, tiny_model, capsys):
    own = ["--model.surrogate=own_parts.unclipped", "--model.surrogate_args={size: 2.0}"]
    assert main(["fit", "-c", str(BASES[0]), f"--model.model={tiny_model}", *CPU, *own]) == 2
    assert "surrogate 'unclipped' has no setting 'size'; it has scale" in capsys.readouterr().err

"""The command line, and every configuration that is shipped, with tiny parts in place of large ones."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from grpo_lightning import RolloutDataModule
from grpo_lightning.adapters import save_adapter
from grpo_lightning.cli import main, run
from grpo_lightning.loading import load_policy
from grpo_lightning.tasks import sequential, shuffled

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--data.engine=fakes.FakeEngine",
    "--data.max_tokens=20",
    "--data.prompts_per_rollout=2",
    "--data.samples_per_prompt=2",
    "--data.val_size=3",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.num_sanity_val_steps=-1",
    # The fake engine's logprobs are random numbers.
    "--trainer.callbacks+=grpo_lightning.callbacks.RatioDegeneracyDetector",
    "--trainer.callbacks.max_mismatch=100",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_fit_leaves_a_run_folder(folder, tiny_model, config, capsys):
    model = [f"--model.model={tiny_model}"]
    if "adapter" in yaml.safe_load(config.read_text())["model"]:
        save_adapter(load_policy(tiny_model), folder / "adapter")
        model.append(f"--model.adapter={folder / 'adapter'}")
    cli = run(["fit", "-c", str(config), *model, "--seed_everything=3", *TINY])
    assert cli.trainer.global_step == 2 * cli.datamodule.updates_per_epoch
    assert cli.datamodule.seed == 3
    ((version,),) = (list(run.iterdir()) for run in (folder / "runs").iterdir())
    for name in (
        "config.yaml",
        "metrics.csv",
        "completions.jsonl",
        "summary.json",
        "summary.png",
        "checkpoints/last.ckpt",
    ):
        assert (version / name).stat().st_size, name
    assert list(version.glob("events.out.tfevents*"))

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (adapter,) = (version / "adapters").iterdir()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    trained = cli.model.policy.trainable_parameters()
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, trained[name])

    summary = json.loads((version / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert {"accuracy_before", "accuracy_after", "reward_first", "reward_last", "seconds", "tokens_per_second"} <= set(
        summary
    )
    assert set(summary["ratio_last_epoch"]) == {"mean", "std", "min", "max", "count"}
    assert {"torch", "lightning", "grpo-lightning"} <= set(summary["versions"])
    completions = [json.loads(line) for line in (version / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 2 * 2 * 2
    assert {"task", "completion", "reward", "advantage", "policy_version"} <= set(completions[0])
    printed = capsys.readouterr().out
    assert "epoch 2/2 | reward" in printed
    for path in ("summary.json", "summary.png", "completions.jsonl", str(adapter.name)):
        assert path in printed

    again = run(["validate", "-c", str(version / "config.yaml"), f"--ckpt_path={version}/checkpoints/last.ckpt"])
    assert again.model.policy_version == cli.model.policy_version
    assert "val/accuracy" in again.trainer.callback_metrics


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_first_line_says_what_it_is(config):
    first = config.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert ("Not run on a GPU yet" in first) == ("accelerator: gpu" in config.read_text())


def test_saved_settings_can_be_run_again(folder, tiny_model, capsys):
    arguments = [f"--model.model={tiny_model}", *TINY]
    assert main(["fit", "-c", str(CONFIGS[0]), *arguments, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["rewards"] == ["grpo_lightning.rewards.last_number_correct"]
    assert printed["trainer"]["reload_dataloaders_every_n_epochs"] == 1


def test_help_explains_every_setting(folder, capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for phrase in ("Completions of each task", "Lower clip of the ratio", "Longest completion"):
        assert phrase in text


def data_module(settings):
    """The data module of a YAML file with these settings."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(RolloutDataModule, "data")
    required = {
        "tasks": {"class_path": "grpo_lightning.tasks.SumTasks"},
        "rewards": "grpo_lightning.rewards.last_number_correct",
        "engine": "fakes.FakeEngine",
    }
    config = parser.parse_string(yaml.safe_dump({"data": {**required, **settings}}))
    return parser.instantiate_classes(config).data


def test_the_order_is_set_by_import_path():
    assert data_module({}).order is shuffled
    assert data_module({"order": "grpo_lightning.tasks.sequential"}).order is sequential
    widening = {"class_path": "grpo_lightning.tasks.Widening", "init_args": {"start": 0.5, "positions": 10}}
    order = data_module({"order": widening}).order
    assert max(order(0, 100, seed) for seed in range(300)) in range(45, 50)
    assert [order(p, 100, 0) for p in range(10, 99)] == [shuffled(p, 100, 0) for p in range(10, 99)]


def test_the_order_is_part_of_the_saved_settings(folder, tiny_model, capsys):
    widening = ["--data.order=grpo_lightning.tasks.Widening", "--data.order.positions=7"]
    assert main(["fit", "-c", str(CONFIGS[0]), f"--model.model={tiny_model}", *TINY, *widening, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["order"] == {
        "class_path": "grpo_lightning.tasks.Widening",
        "init_args": {"start": 0.1, "positions": 7},
    }


def test_files_and_their_columns_are_set_in_yaml(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"question": "1+1?", "solution": "2"}\n')
    tasks = {
        "class_path": "grpo_lightning.tasks.JsonlTasks",
        "init_args": {
            "path": str(tmp_path / "tasks.jsonl"),
            "columns": {"prompt": "question", "answer": "solution"},
        },
    }
    (task,) = data_module({"tasks": tasks}).tasks
    assert [message["content"] for message in task.messages] == ["1+1?"]
    assert task.data == {"answer": "2"}

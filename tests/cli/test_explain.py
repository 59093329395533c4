"""Mistakes in settings, through the real parser."""

import pytest
import yaml

from grpo_lightning.cli import main

COMPLETE = {
    "model": {"model": "x"},
    "data": {
        "tasks": {"class_path": "grpo_lightning.tasks.SumTasks"},
        "rewards": ["grpo_lightning.rewards.last_number_correct"],
        "engine": {"class_path": "grpo_lightning.TransformersEngine"},
    },
}


@pytest.fixture
def complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "complete.yaml").write_text(yaml.safe_dump(COMPLETE))
    return ["fit", "-c", "complete.yaml"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.lerning_rate=3", "there is no setting model.lerning_rate; did you mean model.learning_rate?"),
        ("data.engine.dtyp=x", "there is no setting data.engine.dtyp; did you mean data.engine.dtype?"),
        ("trainer.max_epochz=3", "there is no setting trainer.max_epochz; did you mean trainer.max_epochs?"),
        ("modle.model=3", "there is no setting modle.model; did you mean model.model?"),
        ("model.bananas=3", "there is no setting model.bananas; grpo_lightning.GRPOModule has none"),
        ("data.max_tokens=abc", "data.max_tokens: expected int, but got 'abc'"),
        ("trainer.max_epochs=abc", "trainer.max_epochs: expected int or null, but got 'abc'"),
        ("data.engine.max_batch_size=abc", "data.engine.max_batch_size: expected int, but got 'abc'"),
        ("data.engine.dtype=int", "data.engine.dtype: expected one of 'auto', 'float32', 'bfloat16', but got 'int'"),
        (
            "model.lr_schedule=cosin",
            "model.lr_schedule: expected one of 'constant', 'linear', 'cosine', but got 'cosin'",
        ),
        ("seed_everything=x", "seed_everything: expected bool or int, but got 'x'"),
        (
            "data.engine=TransformersEngin",
            "data.engine: expected an import path (package.module.name), but got 'TransformersEngin'; "
            "did you mean grpo_lightning.TransformersEngine?",
        ),
        (
            "data.tasks=grpo_lightning.tasks.SumTask",
            "data.tasks: there is no SumTask in grpo_lightning.tasks; did you mean grpo_lightning.tasks.SumTasks?",
        ),
        ("data.rewards=[nowhere.f]", "data.rewards: there is no module 'nowhere' to import from"),
        ("model=nowhere.Module", "model: there is no module 'nowhere' to import from"),
        ("data.val_tasks.max_number=3", "data.val_tasks: expected a class, by import path, before its settings"),
        ("data.rewards=null", "expected at least one reward function, or an environment that gives rewards"),
        ("data.samples_per_prompt=1", "expected samples_per_prompt >= 2, but got 1"),
        ("data.updates_per_rollout=3", "use --data.updates_per_rollout 2"),
        ("ckpt_path=nowhere.ckpt", "expected a checkpoint at ckpt_path, but there is none at nowhere.ckpt"),
    ],
)
def test_what_is_wrong_and_what_is_right(complete, setting, message, capsys):
    assert main([*complete, f"--{setting}"]) == 2
    _, error = capsys.readouterr()
    report = error[error.index("error: ") :]
    assert message in report
    assert report.count("\n") <= 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"lerning_rate": 3}}, "there is no setting model.lerning_rate; did you mean model.learning_rate?"),
        ({"modle": {"model": "x"}}, "there is no setting modle.model; did you mean model.model?"),
        (
            {"data": {"environment": {"class_path": "games.Echo", "init_args": {"turnz": 3}}}},
            "there is no setting data.environment.turnz; did you mean data.environment.turns?",
        ),
        (
            {"data": {"environment": {"class_path": "games.Echo", "init_args": {"bananas": 3}}}},
            "there is no setting data.environment.bananas; games.Echo has none",
        ),
        (
            {"data": {"environment": {"class_path": "collections.OrderedDict"}}},
            "data.environment: expected a subclass of Environment, but got collections.OrderedDict",
        ),
        (
            {
                "trainer": {
                    "callbacks": [{"class_path": "grpo_lightning.callbacks.AdapterExport", "init_args": {"kep": 3}}]
                }
            },
            "there is no setting trainer.callbacks.kep; did you mean trainer.callbacks.keep?",
        ),
        ({"data": {"val_size": "many"}}, "data.val_size: expected int, but got 'many'"),
        (
            {"trainer": {"logger": [{"class_path": "lightning.pytorch.loggers.CSVLoger"}]}},
            "trainer.logger: there is no CSVLoger in lightning.pytorch.loggers; "
            "did you mean lightning.pytorch.loggers.CSVLogger?",
        ),
    ],
)
def test_the_same_in_a_file(complete, settings, message, capsys, tmp_path):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(settings))
    assert main([*complete, "-c", "wrong.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_nothing_given(capsys):
    assert main(["fit"]) == 2
    assert (
        "missing model.model; set them in a configuration file (-c) or as --model.model VALUE"
        in capsys.readouterr().err
    )


def test_a_stray_argument(complete, capsys):
    assert main([*complete, "extra"]) == 2
    assert "unexpected argument 'extra'; settings are given as --name value" in capsys.readouterr().err

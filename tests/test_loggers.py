"""One run, five loggers: each tool's own reader finds the same tags, steps and values."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from short_run import short_run
from shown_markdown import shown_table
from wandb_file import history

from grpo_lightning.callbacks import CompletionLog
from grpo_lightning.loggers import TrackioLogger

COLUMNS = ["epoch", "task", "prompt", "completion", "reward", "advantage", "reward/length", "reward/lambda"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, trackio_directory):
    """Two epochs of two updates with validation, logged to every tool at once."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        # WandbLogger(offline=True) sets it and leaves it.
        patch.setenv("WANDB_MODE", "offline")
        loggers = [
            CSVLogger(folder),
            TensorBoardLogger(folder, default_hp_metric=False),
            WandbLogger(project="sums", save_dir=folder, offline=True),
            MLFlowLogger("sums", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=f"{folder}/artifacts"),
            TrackioLogger("sums", dir=trackio_directory),
        ]
        trainer = short_run(
            tiny_model,
            folder,
            loggers,
            updates=2,
            max_epochs=2,
            callbacks=[CompletionLog(rows=5)],
            num_sanity_val_steps=0,
        )
        loggers[2].experiment.finish()
    return dict(zip(["csv", "tensorboard", "wandb", "mlflow", "trackio"], trainer.loggers, strict=True))


def from_csv(logger):
    with open(logger.experiment.metrics_file_path, newline="") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag != "step":
                    yield tag, int(row["step"]), float(value)


def from_tensorboard(logger):
    reader = tensorboard_reader(logger)
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            yield tag, event.step, event.value


def tensorboard_reader(logger):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def wandb_path(logger):
    (path,) = Path(logger.save_dir, "wandb").glob(f"*run-*-{logger.version}/run-*.wandb")
    return path


def from_wandb(logger):
    for row in history(wandb_path(logger)):
        step = row.pop("trainer/global_step")
        for tag, value in row.items():
            if not tag.startswith("_") and not isinstance(value, dict):
                yield tag, step, float(value)


def from_mlflow(logger):
    client = logger.experiment
    for tag in client.get_run(logger.run_id).data.metrics:
        for metric in client.get_metric_history(logger.run_id, tag):
            yield tag, metric.step, metric.value


def trackio_rows(logger):
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(logger.name, run_id=logger.experiment.id)


def from_trackio(logger):
    for row in trackio_rows(logger):
        for tag, value in row.items():
            if tag not in ("step", "timestamp") and not isinstance(value, dict):
                yield tag, row["step"], float(value)


READERS = {
    "csv": from_csv,
    "tensorboard": from_tensorboard,
    "wandb": from_wandb,
    "mlflow": from_mlflow,
    "trackio": from_trackio,
}


def read(run, tool):
    values = defaultdict(lambda: defaultdict(set))
    for tag, step, value in READERS[tool](run[tool]):
        values[tag][step].add(value)
    return values


@pytest.mark.parametrize("tool", READERS)
def test_tags_steps_and_values_are_the_same_everywhere(run, tool):
    expected, found = read(run, "csv"), read(run, tool)
    assert set(found) == set(expected)
    for tag, by_step in expected.items():
        assert sorted(found[tag]) == sorted(by_step), tag
        for step, values in by_step.items():
            # TensorBoard keeps float32.
            assert sorted(found[tag][step]) == pytest.approx(sorted(values), rel=1e-6), (tag, step)


def test_updates_and_epochs_are_at_their_steps(run):
    values = read(run, "csv")
    for tag in ("policy/grad_norm", "ppo/ratio_mean", "ppo/ratio_std"):
        assert sorted(values[tag]) == [0, 1, 2, 3], tag
    for tag in ("reward/mean", "completion/length_mean", "time/rollout_seconds", "val/accuracy", "val/reward"):
        assert sorted(values[tag]) == [1, 3], tag


@pytest.fixture
def expected(run):
    lines = Path(run["csv"].log_dir, "completions.jsonl").read_text().splitlines()
    return [[_row(r) for r in map(json.loads, lines) if r["epoch"] == epoch] for epoch in (0, 1)]


class TestTables:
    """What each tool shows of the completions is what ``completions.jsonl`` holds."""

    def check(self, tables, expected):
        assert len(tables) == 2
        for rows, possible in zip(tables, expected, strict=True):
            assert len(rows) == 5
            for row in rows:
                assert any(row == pytest.approx(other) for other in possible), row

    def test_wandb(self, run, expected):
        path = wandb_path(run["wandb"])
        logged = [row for row in history(path) if "completions" in row]
        assert [row["trainer/global_step"] for row in logged] == [0, 2]
        files = [json.loads((path.parent / "files" / row["completions"]["path"]).read_text()) for row in logged]
        assert all(file["columns"] == COLUMNS for file in files)
        self.check([file["data"] for file in files], expected)

    def test_mlflow(self, run, expected):
        logger = run["mlflow"]
        table = logger.experiment.load_table(logger.experiment_id, "completions.json", [logger.run_id])
        assert list(table.columns) == COLUMNS
        rows = table.values.tolist()
        self.check([[row for row in rows if row[0] == epoch] for epoch in (0, 1)], expected)

    def test_trackio(self, run, expected):
        logged = [row for row in trackio_rows(run["trackio"]) if "completions" in row]
        assert [row["step"] for row in logged] == [0, 2]
        tables = [row["completions"]["_value"] for row in logged]
        assert all(list(row) == COLUMNS for table in tables for row in table)
        self.check([[list(row.values()) for row in table] for table in tables], expected)

    def test_tensorboard(self, run, expected):
        events = tensorboard_reader(run["tensorboard"]).Tensors("completions/text_summary")
        assert [event.step for event in events] == [0, 2]
        texts = [event.tensor_proto.string_val[0].decode() for event in events]
        for text, possible in zip(texts, expected, strict=True):
            header, *rows = shown_table(text)
            assert header == COLUMNS
            assert len(rows) == 5
            # A Markdown table has no spaces at the ends of a cell.
            known = {(row[1], row[3].strip()) for row in possible}
            assert {(row[1], row[3]) for row in rows} <= known


def _row(record):
    prompt = "\n".join(f"{m['role']}: {m['content']}" for m in record["prompt"])
    return [
        record["epoch"],
        record["task"],
        prompt,
        record["completion"],
        record["reward"],
        record["advantage"],
        *record["rewards"].values(),
    ]

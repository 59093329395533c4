"""Every run has a folder of its own, whatever logs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from short_run import short_run

from grpo_lightning.callbacks import AdapterExport, CompletionLog, RunSummary
from grpo_lightning.callbacks.run_directory import new_file, run_directory
from grpo_lightning.loggers import TrackioLogger

LOGGERS = {
    "csv": lambda folder, trackio: CSVLogger(folder),
    "tensorboard": lambda folder, trackio: TensorBoardLogger(folder),
    "wandb": lambda folder, trackio: WandbLogger(project="sums", save_dir=folder, offline=True),
    "mlflow": lambda folder, trackio: MLFlowLogger("sums", tracking_uri=f"sqlite:///{folder}/mlflow.db"),
    "trackio": lambda folder, trackio: TrackioLogger("folders", dir=trackio),
    "none": lambda folder, trackio: False,
}
ROOT = {
    "csv": lambda folder, trackio, logger: folder / "lightning_logs",
    "tensorboard": lambda folder, trackio, logger: folder / "lightning_logs",
    "wandb": lambda folder, trackio, logger: folder / "sums",
    "mlflow": lambda folder, trackio, logger: folder / logger.experiment_id,
    "trackio": lambda folder, trackio, logger: trackio / "folders",
    "none": lambda folder, trackio, logger: folder / "grpo_lightning_runs",
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_two_runs_have_two_folders(tmp_path, tiny_model, trackio_directory, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folders = []
    for _ in range(2):
        logger = LOGGERS[kind](tmp_path, trackio_directory)
        checkpoint = ModelCheckpoint(save_last=True)
        callbacks = [checkpoint, CompletionLog(), RunSummary(plot=False), AdapterExport()]
        trainer = short_run(tiny_model, tmp_path, logger, callbacks=callbacks, enable_checkpointing=True)
        folder = run_directory(trainer)
        assert folder.parent == ROOT[kind](tmp_path, trackio_directory, logger)
        assert len((folder / "completions.jsonl").read_text().splitlines()) == 12
        assert json.loads((folder / "summary.json").read_text())["epochs"] == 1
        assert (folder / "adapters" / "epoch-0000").is_dir()
        if logger:
            assert Path(checkpoint.dirpath) == folder / "checkpoints"
        folders.append(folder)
        if kind == "wandb":
            logger.experiment.finish()
    assert folders[0] != folders[1]


@pytest.mark.parametrize(
    "settings", [{"logger": False}, {"logger": False, "fast_dev_run": True}, {"fast_dev_run": True}]
)
def test_without_a_logger_versions_are_counted_and_kept(tmp_path, settings):
    trainers = [Trainer(default_root_dir=tmp_path, accelerator="cpu", **settings) for _ in range(2)]
    found = [run_directory(trainer) for trainer in trainers]
    assert found == [tmp_path / "grpo_lightning_runs" / f"version_{n}" for n in (0, 1)]
    assert [run_directory(trainer) for trainer in trainers] == found


RANKS = """
import sys
from pathlib import Path
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from grpo_lightning.callbacks.run_directory import new_file, run_directory

class Note(Callback):
    def setup(self, trainer, pl_module, stage):
        Path(sys.argv[1], f"rank-{trainer.global_rank}").write_text(str(run_directory(trainer)))

if __name__ == "__main__":
    Trainer(
        default_root_dir=sys.argv[1], accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, callbacks=Note(),
        max_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(BoringModel())
"""


def test_all_ranks_have_the_same_folder(tmp_path):
    done = subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = str(tmp_path / "grpo_lightning_runs" / "version_0")
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == [expected, expected]
    assert len(list((tmp_path / "grpo_lightning_runs").iterdir())) == 1


def test_a_new_file_is_never_one_that_is_there(tmp_path):
    folder = tmp_path / "new"
    for expected in ("a.jsonl", "a-1.jsonl", "a-2.jsonl"):
        path = new_file(folder, "a.jsonl")
        assert path == folder / expected
        path.touch()

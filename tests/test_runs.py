import json
import os
import zipfile

import numpy as np
import pytest
import torch
from made_epochs import made_epoch

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.runs import (
    Progress,
    checkpoint_of_version,
    drop_later_records,
    find_run,
    newest_checkpoint,
    run_model,
)
from grpo_lightning.trajectories.store import load_epoch, stored_epochs, write_epoch


def checkpoint(folder, name, step=0, *, whole=True, age=0):
    path = folder / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step, "state_dict": {"weight": torch.zeros(5)}}, path)
    if not whole:
        path.write_bytes(path.read_bytes()[:500])
    os.utime(path, (1000 - age, 1000 - age))
    return path


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}\n")
    return tmp_path


def test_the_highest_step_comes_first_whatever_its_name_and_age(run):
    checkpoint(run, "last.ckpt", 9)
    highest = checkpoint(run, "best.ckpt", 10, age=99)
    checkpoint(run, "epoch=9-step=90.ckpt", 8)
    assert find_run(run) == (run / "config.yaml", highest)


def test_of_the_same_step_the_one_written_last(run):
    checkpoint(run, "last.ckpt", 9, age=50)
    newer = checkpoint(run, "last-v1.ckpt", 9, age=10)
    assert find_run(run)[1] == newer


def test_what_is_no_whole_checkpoint_is_passed_over(run):
    whole = checkpoint(run, "epoch=2-step=10.ckpt", 10, age=99)
    checkpoint(run, "last.ckpt", 12, whole=False)
    with zipfile.ZipFile(run / "checkpoints" / "other.ckpt", "w") as archive:
        archive.writestr("data", "of something else")
    assert newest_checkpoint(run) == newest_checkpoint(run / "checkpoints") == whole
    whole.unlink()
    assert newest_checkpoint(run) is None


def test_the_checkpoint_of_a_policy_version(run):
    for version in (2, 4):
        path = run / "checkpoints" / f"step={version}.ckpt"
        path.parent.mkdir(exist_ok=True)
        torch.save({"grpo_lightning": {"policy_version": version}}, path)
    checkpoint(run, "other.ckpt", 3)
    checkpoint(run, "broken.ckpt", 3, whole=False)
    assert checkpoint_of_version(run, 4) == run / "checkpoints" / "step=4.ckpt"
    assert checkpoint_of_version(run, 3) is None


def test_the_settings_of_the_last_time(run):
    last = checkpoint(run, "last.ckpt")
    for number in (1, 2, 10):
        (run / f"config-{number}.yaml").write_text("model: {}\n")
    (run / "config-old.yaml").write_text("model: {}\n")
    assert find_run(run) == (run / "config-10.yaml", last)


def test_without_settings_it_is_no_run(tmp_path):
    checkpoint(tmp_path, "last.ckpt")
    with pytest.raises(ConfigurationError, match=r"config.yaml \(not there\), .*ckpt \(found\)"):
        find_run(tmp_path)


@pytest.mark.parametrize(("begun", "kept"), [(2, [0, 1]), (3, [0, 1, 2])])
def test_later_trajectories_go(tmp_path, begun, kept):
    for epoch in range(4):
        tokens = sum(len(ledger) for group in made_epoch().groups for e in group.episodes for ledger in e.ledgers)
        write_epoch(tmp_path, made_epoch(epoch=epoch, log_ratios=np.zeros(tokens)))
    drop_later_records(tmp_path, Progress(begun, finished=2, step=5))
    assert list(stored_epochs(tmp_path)) == kept
    with_ratios = [epoch for epoch, path in stored_epochs(tmp_path).items() if load_epoch(path).log_ratios is not None]
    assert with_ratios == [0, 1]
    assert len(list((tmp_path / "trajectories").iterdir())) == len(kept)


@pytest.mark.parametrize(
    ("progress", "rows", "epochs"),
    [
        # Saved at the end of the second epoch, with what was validated after it.
        (Progress(begun=2, finished=2, step=4), [",0,", "0,1,0.5", "1,3,0.6", "1,4,0.8"], [0, 1]),
        # Saved within the third.
        (Progress(begun=3, finished=2, step=5), [",0,", "0,1,0.5", "1,3,0.6", "1,4,0.8", "2,4,0.1"], [0, 1, 2]),
    ],
)
def test_later_records_go(tmp_path, progress, rows, epochs):
    header, *written = ["epoch,step,reward", ",0,", "0,1,0.5", "1,3,0.6", "1,4,0.8", "2,4,0.1", "2,5,0.7", "3,7,0.9"]
    (tmp_path / "metrics.csv").write_text("\n".join([header, *written, ""]))
    lines = [json.dumps({"epoch": e, "text": "ä"}, ensure_ascii=False) + "\n" for e in range(4)]
    (tmp_path / "completions.jsonl").write_text("".join(lines))
    drop_later_records(tmp_path, progress)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [header, *rows]
    assert (tmp_path / "completions.jsonl").read_text() == "".join(lines[e] for e in epochs)


def test_a_folder_without_records_stays_empty(tmp_path):
    drop_later_records(tmp_path, Progress(begun=0, finished=0, step=0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("config.yaml", "model: {model: org/name, dtype: float32}"),
        ("config.yaml", "model: {class_path: my.Module, init_args: {model: org/name}}"),
        ("hparams.yaml", "_instantiator: x\nmodel: org/name"),
    ],
)
def test_the_model_of_a_run(tmp_path, name, settings):
    (tmp_path / name).write_text(settings)
    assert run_model(tmp_path) == "org/name"


def test_the_newest_settings_name_the_model(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {model: old}")
    (tmp_path / "config-2.yaml").write_text("model: {model: new}")
    assert run_model(tmp_path) == "new"


@pytest.mark.parametrize("settings", ["", "- model", "trainer: {}", "model: {dtype: float32}", "model: [", "model: 3"])
def test_a_run_that_names_no_model(tmp_path, settings):
    (tmp_path / "config.yaml").write_text(settings)
    assert run_model(tmp_path) is None

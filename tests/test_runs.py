import os
import zipfile

import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.runs import drop_later_records, find_run


def checkpoint(folder, name, *, whole=True, age=0):
    path = folder / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    if whole:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data", "weights")
    else:
        path.write_bytes(b"PK\x03\x04 cut off")
    os.utime(path, (1000 - age, 1000 - age))
    return path


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}\n")
    return tmp_path


def test_last_comes_first(run):
    checkpoint(run, "epoch=9-step=90.ckpt")
    last = checkpoint(run, "last.ckpt", age=50)
    assert find_run(run) == (run / "config.yaml", last)


def test_the_newest_of_several_last_ones(run):
    checkpoint(run, "last.ckpt", age=50)
    newer = checkpoint(run, "last-v1.ckpt", age=10)
    assert find_run(run)[1] == newer


def test_else_the_highest_step_whatever_its_age(run):
    checkpoint(run, "last.ckpt", whole=False)
    checkpoint(run, "epoch=1-step=9.ckpt")
    highest = checkpoint(run, "epoch=2-step=10.ckpt", age=99)
    checkpoint(run, "epoch=3-step=11.ckpt", whole=False)
    assert find_run(run)[1] == highest


def test_without_settings_it_is_no_run(tmp_path):
    checkpoint(tmp_path, "last.ckpt")
    with pytest.raises(ConfigurationError, match=r"config.yaml \(not there\), .*ckpt \(found\)"):
        find_run(tmp_path)


def test_later_records_go(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,reward\n,0,\n0,1,0.5\n1,3,0.6\n2,5,0.7\n")
    (tmp_path / "completions.jsonl").write_text('{"epoch": 1, "text": "ä"}\n{"epoch": 2}\n')
    drop_later_records(tmp_path, 1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,step,reward", ",0,", "0,1,0.5", "1,3,0.6"]
    assert (tmp_path / "completions.jsonl").read_text() == '{"epoch": 1, "text": "ä"}\n'


def test_a_folder_without_records_stays_empty(tmp_path):
    drop_later_records(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []

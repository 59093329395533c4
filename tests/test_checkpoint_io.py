"""A checkpoint is whole or absent, whatever kills the process or fills the disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_lightning.checkpoint_io import DurableCheckpointIO
from grpo_lightning.errors import CheckpointError, WriteError

OLD, NEW = {"value": torch.zeros(1000)}, {"value": torch.ones(1000)}


@pytest.fixture
def io():
    return DurableCheckpointIO()


def only(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip_replaces_and_leaves_nothing_else(tmp_path, io):
    path = tmp_path / "new" / "a.ckpt"
    for content in (OLD, NEW):
        io.save_checkpoint(content, path)
        assert torch.equal(io.load_checkpoint(path, weights_only=True)["value"], content["value"])
    assert only(path.parent) == {"a.ckpt"}


def test_what_cannot_be_pickled_leaves_the_old_file(tmp_path, io):
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(OLD, path)
    with pytest.raises((AttributeError, TypeError)):
        io.save_checkpoint({"value": lambda: 0}, path)
    assert torch.equal(io.load_checkpoint(path)["value"], OLD["value"])
    assert only(tmp_path) == {"a.ckpt"}


def test_a_full_disk(tmp_path, io, full_disk):
    path = full_disk / "a.ckpt"
    io.save_checkpoint(OLD, path)
    with pytest.raises(WriteError, match=r"could not write .*a\.ckpt.*MiB are free there.*untouched: make space"):
        io.save_checkpoint({"value": torch.zeros(10**6)}, path)
    assert torch.equal(io.load_checkpoint(path)["value"], OLD["value"])
    assert only(full_disk) == {"a.ckpt"}


@pytest.mark.parametrize("truncated", [False, True])
def test_what_is_damaged_while_writing_is_not_published(tmp_path, io, monkeypatch, truncated):
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(OLD, path)
    save = torch.save

    def damaged(content, file):
        save(content, file)
        if truncated:
            file.truncate(file.tell() // 2)
        else:
            file.seek(2000)
            file.write(b"damage")

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(WriteError, match=r"could not write .*a\.ckpt"):
        io.save_checkpoint(NEW, path)
    assert torch.equal(io.load_checkpoint(path)["value"], OLD["value"])


def test_broken_and_missing_files_are_named(tmp_path, io):
    path = tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError, match=r"expected a checkpoint at .*a\.ckpt"):
        io.load_checkpoint(path)
    for content in (b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be read as a checkpoint"):
            io.load_checkpoint(path, weights_only=True)


KILLS = """
import os, signal, sys, time, torch
from grpo_lightning.checkpoint_io import DurableCheckpointIO

io, path = DurableCheckpointIO(), sys.argv[1]
for kill in range(40):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for number in range(10**6):
            io.save_checkpoint({"number": number, "value": torch.full((300_000,), float(number))}, path)
            os.write(writer, b".")
    os.read(reader, 1)
    time.sleep(kill / 4000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = io.load_checkpoint(path, weights_only=True)
    assert bool((loaded["value"] == loaded["number"]).all()), kill
"""


def test_killed_at_any_moment(tmp_path, io):
    path = tmp_path / "a.ckpt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLS, str(path)], check=True, timeout=300, env=environment)
    assert only(tmp_path) <= {"a.ckpt", ".a.ckpt.partial"}
    io.save_checkpoint(OLD, path)
    assert only(tmp_path) == {"a.ckpt"}

"""What ``replay`` prints of a run that the command line made, and what it refuses."""

import csv
import json
import re
import shlex
import shutil

import pytest
import torch
import yaml

from grpo_lightning.checkpoint_check import STATE_KEY
from grpo_lightning.cli import main

RUN = "runs/small run/version_0"


@pytest.fixture
def run(settings, folder):
    content = yaml.safe_load((folder / "small.yaml").read_text())
    content["trainer"]["callbacks"].append({"class_path": "grpo_lightning.callbacks.TrajectoryStore"})
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", *settings]) == 0
    return folder / RUN


def checkpoint(run, step):
    (path,) = run.glob(f"checkpoints/*step={step}.ckpt")
    return path


def files(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_what_the_run_logged(run, folder, capsys):
    capsys.readouterr()
    before = files(run)
    path = str(checkpoint(run, 2))
    assert main(["replay", RUN, "--epoch", "1", "--checkpoint", path, "--json", "replay.json"]) == 0
    assert files(run) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Checkpoint: {path} (policy version 2)"
    assert lines[1].split() == "update loss tokens ratio mean std min max mismatch mean max k3".split()  # noqa: SIM905
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    # The fake engine's logprobs are random numbers.
    assert lines[4].startswith("The checkpoint holds the weights that sampled the epoch, so the ratios must be 1")
    assert lines[4].endswith("nats on average. The engine sampled from something else")
    replayed = json.loads((folder / "replay.json").read_text())
    assert (replayed["epoch"], replayed["policy_version"], len(replayed["updates"])) == (1, 2, 2)
    with (run / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["policy/grad_norm"]][2]
    for name in ("mean", "std", "min", "max", "count"):
        found = replayed["updates"][0][f"ppo/ratio_{name}"]
        assert found == pytest.approx(float(logged[f"ppo/ratio_{name}"]), rel=1e-6)
    assert lines[2].split()[3] == f"{replayed['updates'][0]['ppo/ratio_mean']:.6g}"


def test_weights_of_another_version(run, folder, capsys):
    capsys.readouterr()
    assert main(["replay", RUN, "--epoch", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("(policy version 4)")
    assert lines[4].startswith("The epoch was sampled by policy version 2, the checkpoint holds 4: the ratios show")
    assert lines[4].endswith(
        f"What sampled it: --checkpoint {shlex.quote(str(checkpoint(run, 2).relative_to(folder)))}"
    )
    assert main(["replay", RUN, "--epoch", "0"]) == 0
    assert "No checkpoint of the run holds what sampled it: ModelCheckpoint(" in capsys.readouterr().out


class TestRefused:
    def refused(self, capsys, *args):
        capsys.readouterr()
        assert main(["replay", *args]) == 2
        return capsys.readouterr().err

    def test_no_run(self, folder, capsys):
        assert f"expected a run's folder, but there is no {'none'}/config.yaml" in self.refused(
            capsys, "none", "--epoch", "0"
        )

    def test_an_epoch_that_is_not_stored(self, run, capsys):
        message = f"expected a stored epoch 7 in {RUN}, but there are: 0, 1"
        assert message in self.refused(capsys, RUN, "--epoch", "7")
        shutil.rmtree(run / "trajectories")
        assert "are: none; the callback TrajectoryStore stores them" in self.refused(capsys, RUN, "--epoch", "0")

    def test_no_checkpoint(self, run, capsys):
        for path in run.glob("checkpoints/*"):
            path.unlink()
        message = f"expected a whole checkpoint in {RUN}/checkpoints, but there is none; give one with --checkpoint"
        assert message in self.refused(capsys, RUN, "--epoch", "0")
        assert "there is no such file" in self.refused(capsys, RUN, "--epoch", "0", "--checkpoint", "other.ckpt")

    def test_a_checkpoint_of_another_model(self, run, capsys):
        saved = torch.load(checkpoint(run, 2), weights_only=True)
        saved[STATE_KEY]["start"]["base"] = "another"
        torch.save(saved, "other.ckpt")
        message = "the checkpoint's run started from another base model than"
        assert message in self.refused(capsys, RUN, "--epoch", "0", "--checkpoint", "other.ckpt")

    def test_settings_of_something_else(self, run, capsys):
        content = yaml.safe_load((run / "config.yaml").read_text())
        content["model"]["init_args"]["lora_ranks"] = 3
        (run / "config.yaml").write_text(yaml.safe_dump(content))
        message = self.refused(capsys, RUN, "--epoch", "0")
        assert re.search(rf"expected settings of a GRPOModule in {RUN}/config.yaml, but: .*lora_ranks", message, re.S)

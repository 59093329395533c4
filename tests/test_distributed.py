"""Two processes (gloo) compute what one computes, and fail together."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_lightning.distributed import Processes
from grpo_lightning.trajectories.store import load_epoch, stored_epochs

SCRIPT = Path(__file__).parent / "ddp_script.py"
OWN = ("time/", "throughput/", "memory/", "tokens/input")
"""Numbers that depend on how many processes there are: a copy of the prompt in each is computed in each."""

pytestmark = pytest.mark.slow


def launch(model, folder, **settings):
    settings = {"devices": 1, "aggregation": "sequence", **settings}
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, SCRIPT, model, folder, json.dumps(settings)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip


def results(model, folder, **settings):
    done = launch(model, folder, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]


def assert_close(actual, expected):
    """Equal to 3e-6 of the largest value, which is what float32 sums in another order allow.

    Advantages of both signs cancel, so the terms of the sums are larger than what comes out.
    """
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * max(scale, 1e-30))


@pytest.mark.parametrize(("aggregation", "reward", "accumulate"), [("sequence", "length", 2), ("token", "uneven", 1)])
def test_two_processes_equal_one(tmp_path, tiny_model, aggregation, reward, accumulate):
    settings = {"aggregation": aggregation, "reward": reward, "accumulate": accumulate}
    (one,) = results(tiny_model, tmp_path / "one", **settings)
    two = results(tiny_model, tmp_path / "two", devices=2, **settings)
    assert len(two) == 2
    for rank in two:
        assert rank["version"] == one["version"] == 4
        assert len(rank["gradients"]) == 4
        for mine, expected in zip(rank["gradients"], one["gradients"], strict=True):
            assert_close(mine, expected)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=1e-6)
        for mine, expected in zip(rank["ratios"], one["ratios"], strict=True):
            assert mine == pytest.approx(expected, abs=5e-6)
        assert set(rank["metrics"]) == set(one["metrics"])
        for name, value in one["metrics"].items():
            if not name.startswith(OWN):
                assert rank["metrics"][name] == pytest.approx(value, abs=1e-5, nan_ok=True), name
    assert float(one["gradients"].abs().max()) > 0
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name])


VARIANTS = {
    "clip_cov": {"module": {"surrogate": "clip_cov", "surrogate_args": {"share": 0.2, "low": -9.0, "high": 9.0}}},
    "entropy share and correction": {"module": {"entropy_share": 0.3, "correction": "tis_token"}},
    "kl in the reward": {"module": {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.5, "kl_target": 1e-3}},
    "constant": {"module": {"aggregation": "constant"}},
    "sequences": {"module": {"ratio_level": "sequence", "entropy_coef": 0.01}},
    "compiled": {"module": {"torch_compile": True}, "fewest_tokens": 1},
    "over the batch": {"rollout": {"advantage": "reinforce_pp", "max_refills": 1}, "reward": "flat"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_two_processes_equal_one_in_all_variants(tmp_path, tiny_model, settings):
    (one,) = results(tiny_model, tmp_path / "one", **settings)
    two = results(tiny_model, tmp_path / "two", devices=2, **settings)
    assert len(two) == 2
    for rank in two:
        assert rank["version"] == one["version"] == 4
        for mine, expected in zip(rank["gradients"], one["gradients"], strict=True):
            assert_close(mine, expected)
        for mine, expected in zip(rank["evidence"], one["evidence"], strict=True):
            assert torch.equal(mine["ledger_index"], expected["ledger_index"])
            assert torch.equal(mine["marked"], expected["marked"])
            for name in ("factor", "advantage"):
                torch.testing.assert_close(mine[name], expected[name], rtol=0, atol=1e-4)
            assert mine["kl_coef"] == pytest.approx(expected["kl_coef"])
    assert float(one["gradients"].abs().max()) > 0
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name])


def test_two_processes_end_an_epoch_early_together(tmp_path, tiny_model):
    settings = {
        "module": {"max_kl": 1e-3, "learning_rate": 3e-2},
        "rollout": {"updates_per_rollout": 1, "inner_epochs": 4},
    }
    (one,) = results(tiny_model, tmp_path / "one", **settings)
    two = results(tiny_model, tmp_path / "two", devices=2, **settings)
    assert one["version"] == two[0]["version"] == two[1]["version"] < 8
    for rank in two:
        assert rank["metrics"]["ppo/updates"] == one["metrics"]["ppo/updates"] < 4
        assert len(rank["gradients"]) == len(one["gradients"])


@pytest.mark.vllm
def test_two_processes_share_the_first_ones_vllm(tmp_path, demo_model):
    one, two = results(demo_model, tmp_path / "two", devices=2, engine="vllm", max_epochs=1)
    assert one["version"] == two["version"] == 2
    assert 0 < one["metrics"]["mismatch/logprob_abs_max"] < 1e-3
    assert one["metrics"] == two["metrics"]
    assert torch.equal(one["gradients"], two["gradients"])


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_files_are_written_once_and_a_run_is_resumed_by_two(tmp_path, tiny_model):
    whole = results(tiny_model, tmp_path / "whole", devices=2)
    folder = tmp_path / "whole"
    completions = (folder / "completions.jsonl").read_text().splitlines()
    assert len(completions) == 2 * 18
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2
    assert len(list((folder / "adapters").iterdir())) == 1
    assert {row["step"] for row in rows(folder)} == {"0", "1", "2", "3"}
    resumed = results(tiny_model, tmp_path / "rest", devices=2, ckpt_path=str(folder / "ckpt" / "step=1.ckpt"))
    for mine, expected in zip(resumed, whole, strict=True):
        # The engine batches the requests that are waiting, and a batch's shape decides the last bits of its logprobs.
        assert_close(mine["gradients"], expected["gradients"][1:])
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(mine["weights"][name], weight, rtol=0, atol=1e-6)
    stored, again = ({n: load_epoch(p) for n, p in stored_epochs(f).items()} for f in (folder, tmp_path / "rest"))
    assert list(stored) == list(again) == [0, 1]
    for epoch, content in stored.items():
        ledgers = [ledger for group in content.groups for episode in group.episodes for ledger in episode.ledgers]
        trained = np.concatenate([ledger.sampled for ledger in ledgers])
        # What both processes computed, and before the checkpoint too, is there.
        assert np.array_equal(~np.isnan(content.log_ratios), trained)
        np.testing.assert_allclose(again[epoch].log_ratios, content.log_ratios, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "broken"}, "reward 'broken' raised ZeroDivisionError: oops"),
        ({"fault": "recompute"}, "PPO ratios are degenerate (std=0). Training cannot proceed."),
    ],
)
def test_processes_fail_together(tmp_path, tiny_model, settings, message):
    done = launch(tiny_model, tmp_path / "run", devices=2, **settings)
    assert done.returncode != 0
    told = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert {line[:6] for line in told} == {"rank 0", "rank 1"}, done.stdout + done.stderr
    assert all(message in line for line in told), told


def test_a_single_process_exchanges_with_itself():
    alone = Processes()
    assert (alone.count, alone.first) == (1, True)
    assert alone.gather("x") == ["x"]
    assert alone.from_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        alone.from_first(lambda: 1 // 0)


def test_processes_that_train_different_weights_halt(tmp_path, tiny_model):
    done = launch(tiny_model, tmp_path / "run", devices=2, fault="diverge")
    assert done.returncode == 3, done.stdout + done.stderr
    for rank in (0, 1):
        assert (
            f"rank {rank}: DegeneracyError: The processes train different weights: 1 parameters differ" in done.stdout
        )

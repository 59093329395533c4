import importlib.metadata
import json
import math
import sys

import pytest

from grpo_lightning.callbacks.run_summary import breakdown, draw, summarize
from grpo_lightning.phases import PHASES


def epoch(number, **changes):
    return {
        "reward/mean": 0.1 * number,
        "time/rollout_seconds": 2.0 * number,
        "time/train_seconds": 3.0,
        "memory/trainer_peak_gib": 1.5 + 0.25 * number,
        "tokens/sampled": 100.0 * number,
        "tokens/input": 200.0,
        "tokens/trained": 60.0,
        "ppo/ratio_mean": 1.0 + 0.001 * number,
        "ppo/ratio_std": 0.01 * number,
        "ppo/ratio_min": 0.9,
        "ppo/ratio_max": 1.1,
        "ppo/ratio_count": 60.0,
        **changes,
    }


EPOCHS = [epoch(1), epoch(2), epoch(3)]
SECONDS = {
    "start": 4.0,
    "rollout": 12.0,
    "sync": 0.75,
    "train": 1.0,
    "train_forward": 3.0,
    "train_backward": 4.0,
    "train_optimizer": 1.0,
    "doctor": 1.5,
    "other": 2.75,
}


def test_every_number():
    result = summarize(EPOCHS, [(0, 0.25), (2, 0.5), (3, 0.75)], SECONDS)
    result.pop("versions")
    assert result == {
        "epochs": 3,
        "accuracy_before": 0.25,
        "accuracy_after": 0.75,
        "reward_first": pytest.approx(0.1),
        "reward_last": pytest.approx(0.3),
        "seconds": {
            "total": 30.0,
            "start": 4.0,
            "rollout": 12.0,
            "packing": 0.0,
            "sync": 0.75,
            "rescore": 0.0,
            "train": 9.0,
            "validation": 0.0,
            "checkpoint": 0.0,
            "doctor": 1.5,
            "other": 2.75,
        },
        "share": {
            "start": pytest.approx(4 / 30),
            "rollout": 0.4,
            "packing": 0.0,
            "sync": 0.025,
            "rescore": 0.0,
            "train": 0.3,
            "validation": 0.0,
            "checkpoint": 0.0,
            "doctor": 0.05,
            "other": pytest.approx(2.75 / 30),
        },
        "train_seconds": {"forward": 3.0, "loss": 0.0, "backward": 4.0, "optimizer": 1.0, "other": 1.0},
        "tokens_per_second": {"rollout": 600 / 12, "train_input": 600 / 9, "train_sampled": 180 / 9},
        "peak_memory_gib": {"trainer": 2.25},
        "ratio_last_epoch": {
            "mean": pytest.approx(1.003),
            "std": pytest.approx(0.03),
            "min": 0.9,
            "max": 1.1,
            "count": 60.0,
        },
        "reward_by_epoch": pytest.approx([0.1, 0.2, 0.3]),
        "accuracy_by_epoch": {"0": 0.25, "2": 0.5, "3": 0.75},
    }


@pytest.mark.parametrize(
    ("accuracies", "before", "after"),
    [
        ([], None, None),
        ([(0, 0.3)], 0.3, None),
        ([(1, 0.4)], None, 0.4),
        ([(0, 0.0), (1, 0.0)], 0.0, 0.0),
        ([(0, 0.1), (1, 0.9), (2, 0.2)], 0.1, 0.2),
    ],
)
def test_accuracy_before_and_after(accuracies, before, after):
    result = summarize(EPOCHS, accuracies, SECONDS)
    assert result["accuracy_before"] == before
    assert result["accuracy_after"] == after
    assert result["accuracy_by_epoch"] == {str(e): a for e, a in accuracies}


def test_missing_numbers_count_as_nothing():
    bare = {n: v for n, v in epoch(1).items() if not n.startswith(("time/", "tokens/", "memory/"))}
    result = summarize([bare], [], {})
    assert result["seconds"] == {"total": 0, **dict.fromkeys(PHASES, 0)}
    assert result["share"] == dict.fromkeys(PHASES, 0)
    assert result["tokens_per_second"] == {"rollout": 0, "train_input": 0, "train_sampled": 0}
    assert result["peak_memory_gib"] == {"trainer": 0}


def test_breakdown():
    assert breakdown(summarize(EPOCHS, [], SECONDS)) == [
        "30 s in all, at most 2.25 GiB in the trainer:",
        "  start-up          4.0 s  13%",
        "  rollouts         12.0 s  40%   50 sampled tokens/s",
        "  sync              0.8 s   2%",
        "  training          9.0 s  30%   67 input tokens/s, 20 sampled tokens/s; forward 3.0 s, loss 0.0 s, "
        "backward 4.0 s, optimizer 1.0 s, other 1.0 s",
        "  doctor            1.5 s   5%",
        "  other             2.8 s   9%   Lightning's loop, loggers, other callbacks",
    ]


def test_one_epoch_is_first_and_last():
    result = summarize([epoch(4)], [], SECONDS)
    assert result["reward_first"] == result["reward_last"] == pytest.approx(0.4)


def test_versions_name_what_ran():
    versions = summarize(EPOCHS, [], SECONDS)["versions"]
    for package in ("grpo-lightning", "lightning", "torch", "transformers", "peft"):
        assert versions[package] == importlib.metadata.version(package)


def test_it_can_be_written_as_json():
    result = summarize(EPOCHS, [(0, 0.5)], SECONDS)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("accuracies", [[], [(0, 0.2), (3, 0.6)]])
@pytest.mark.parametrize("epochs", [EPOCHS, EPOCHS[:1], [epoch(1, **{"reward/mean": math.nan})]])
def test_picture(tmp_path, epochs, accuracies):
    pytest.importorskip("matplotlib")
    path = tmp_path / "summary.png"
    draw(epochs, accuracies, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_picture_needs_neither_all_metrics_nor_a_display(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("DISPLAY", raising=False)
    draw([{"reward/mean": 0.5}], [], tmp_path / "summary.png")
    assert (tmp_path / "summary.png").exists()


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="install matplotlib"):
        draw(EPOCHS, [], tmp_path / "summary.png")
    assert list(tmp_path.iterdir()) == []

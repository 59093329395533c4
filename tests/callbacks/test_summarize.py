import importlib.metadata
import json
import math
import sys

import pytest

from grpo_lightning.callbacks.run_summary import draw, summarize


def epoch(number, **changes):
    return {
        "reward/mean": 0.1 * number,
        "time/rollout_seconds": 4.0 * number,
        # The rest of it went on while the trainer was busy.
        "time/rollout_wait_seconds": 2.0 * number,
        "time/train_seconds": 3.0,
        "time/sync_seconds": 0.25,
        "time/doctor_seconds": 0.5,
        "tokens/sampled": 100.0 * number,
        "tokens/trained": 60.0,
        "ppo/ratio_mean": 1.0 + 0.001 * number,
        "ppo/ratio_std": 0.01 * number,
        "ppo/ratio_min": 0.9,
        "ppo/ratio_max": 1.1,
        "ppo/ratio_count": 60.0,
        **changes,
    }


EPOCHS = [epoch(1), epoch(2), epoch(3)]


def test_every_number():
    result = summarize(EPOCHS, [(0, 0.25), (2, 0.5), (3, 0.75)], 30.0)
    result.pop("versions")
    assert result == {
        "epochs": 3,
        "accuracy_before": 0.25,
        "accuracy_after": 0.75,
        "reward_first": pytest.approx(0.1),
        "reward_last": pytest.approx(0.3),
        "seconds": {"total": 30.0, "rollout": 12.0, "train": 9.0, "sync": 0.75, "doctor": 1.5, "other": 6.75},
        "tokens_per_second": {"rollout": 600 / 24, "train_sampled": 180 / 9},
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
    result = summarize(EPOCHS, accuracies, 1.0)
    assert result["accuracy_before"] == before
    assert result["accuracy_after"] == after
    assert result["accuracy_by_epoch"] == {str(e): a for e, a in accuracies}


def test_phases_and_the_rest_are_the_whole():
    seconds = summarize(EPOCHS, [], 100.0)["seconds"]
    assert seconds["rollout"] + seconds["train"] + seconds["sync"] + seconds["doctor"] + seconds[
        "other"
    ] == pytest.approx(100.0)


def test_missing_times_count_as_nothing():
    bare = {n: v for n, v in epoch(1).items() if not n.startswith(("time/", "tokens/"))}
    result = summarize([bare], [], 5.0)
    assert result["seconds"] == {"total": 5.0, "rollout": 0, "train": 0, "sync": 0, "doctor": 0, "other": 5.0}
    assert result["tokens_per_second"] == {"rollout": 0, "train_sampled": 0}


def test_one_epoch_is_first_and_last():
    result = summarize([epoch(4)], [], 5.0)
    assert result["reward_first"] == result["reward_last"] == pytest.approx(0.4)


def test_versions_name_what_ran():
    versions = summarize(EPOCHS, [], 1.0)["versions"]
    for package in ("grpo-lightning", "lightning", "torch", "transformers", "peft"):
        assert versions[package] == importlib.metadata.version(package)


def test_it_can_be_written_as_json():
    result = summarize(EPOCHS, [(0, 0.5)], 1.0)
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

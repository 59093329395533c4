"""Running all presets, and writing down what came of it."""

import json

import pytest

from benchmarks.presets import BASE, PRESETS, Size, base, main, run_all, settings, table, write_down

SIZE = Size()
RESULT = {
    "updates": 6,
    "accuracy_before": 0.25,
    "accuracy_after": 0.5,
    "reward_by_epoch": [0.3, 0.41, 0.456],
    "verdicts": {"pass": 30, "fail": 0, "no power": 4},
    "failed": [],
    "warned": ["slow"],
    "error": "",
    "seconds": 61.7,
}
BROKEN = {
    **RESULT,
    "accuracy_before": None,
    "accuracy_after": None,
    "reward_by_epoch": [],
    "failed": ["flat", "stale"],
    "warned": [],
    "error": "ValueError: no: colons | here",
}


@pytest.fixture(autouse=True)
def logs_stay(monkeypatch):
    monkeypatch.setattr("benchmarks.presets.quiet", lambda: None)


def test_a_row_of_the_table():
    rows = table({"dapo": RESULT, "grpo": BROKEN}).splitlines()
    assert rows[0] == "| Preset | Updates | Accuracy | Mean reward by epoch | Failed | Warned | Seconds |"
    assert rows[2] == "| `dapo` | 6 | 0.25 → 0.50 | 0.30 0.41 0.46 | none | slow | 62 |"
    assert rows[3] == "| `grpo` | 6 | – → – | – | flat, stale, stopped by ValueError | none | 62 |"


def test_writing_it_down_again_changes_nothing(tmp_path):
    target, page = tmp_path / "presets.json", tmp_path / "algorithms.md"
    write_down({"dapo": RESULT}, target, page)
    assert not page.exists()
    page.write_text("# Algorithms\n<!-- presets -->\n<!-- /presets -->\n")
    write_down({"dapo": RESULT}, target, page)
    once = page.read_text()
    write_down(json.loads(target.read_text()), target, page)
    assert page.read_text() == once
    assert "`dapo`" in once


def test_it_goes_on_where_it_was_stopped(capsys):
    ran, written = [], []

    def train(name):
        ran.append(name)
        if name == "stops":
            raise KeyboardInterrupt
        return dict(RESULT)

    def go(names, results, size=SIZE, code="1"):
        return run_all(names, results, size, train, lambda name: code, lambda results: written.append(list(results)))

    with pytest.raises(KeyboardInterrupt):
        go(["b", "a", "stops", "c"], {})
    assert written == [["b"], ["a", "b"]]
    ran.clear()
    results = go(["b", "a"], go(["a"], {}))
    assert ran == ["a", "b"]
    ran.clear()
    assert go(["a", "b"], results) == results
    assert ran == []
    go(["a"], results, code="2")
    go(["b"], results, size=Size(epochs=4))
    assert ran == ["a", "b"]


def test_the_demo_is_the_base():
    model, data, micro_batches = base()
    assert model == {"dtype": "float32", "learning_rate": 2e-4, "lr_schedule": "linear"}
    assert micro_batches == 2
    assert data["samples_per_prompt"] == 8
    assert not {"tasks", "rewards", "engine", "val_size"} & set(data)
    assert "SumTasks" in BASE.read_text()


def test_presets_are_those_of_the_configurations():
    assert {"grpo", "dapo", "skywork"} <= set(PRESETS)
    model, data = settings("dapo")
    assert (model["clip_high"], data["max_refills"]) == (0.28, 9)


def test_a_small_run(tiny_model, tmp_path, capsys):
    target = tmp_path / "presets.json"
    arguments = ["--small", "--model", tiny_model, "--json", str(target), "--prompts", "4", "--val-size", "4"]
    main([*arguments, "--epochs", "2", "--only", "dapo", "opo"])
    results = json.loads(target.read_text())
    assert {name: result["updates"] for name, result in results.items()} == {"dapo": 4, "opo": 2}
    for result in results.values():
        assert result["accuracy_before"] == 0.0
        assert result["accuracy_after"] is not None
        assert len(result["reward_by_epoch"]) == 2
        assert result["verdicts"]["pass"] > 0
        assert result["verdicts"]["fail"] == 0
        assert result["size"]["engine"] == "transformers"
    before = target.read_text()
    capsys.readouterr()
    main([*arguments, "--epochs", "2", "--only", "dapo"])
    assert target.read_text() == before
    assert "dapo" not in capsys.readouterr().out


def test_a_run_that_fails_is_written_down(tiny_model, tmp_path):
    target = tmp_path / "presets.json"
    with pytest.raises(SystemExit, match="not healthy: grpo"):
        main(["--small", "--model", tiny_model, "--json", str(target), "--prompts", "3", "--only", "grpo"])
    assert json.loads(target.read_text())["grpo"]["error"].startswith(
        "ConfigurationError: expected updates_per_rollout"
    )

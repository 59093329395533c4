"""The comparison with other tools: what they are shown, and that the documentation shows what they said."""

import json

import pytest
from doc_blocks import DOCS
from fakes import make_episode, make_group
from lightning.pytorch.loggers import CSVLogger
from short_run import short_run

from benchmarks.faults.fault import ZOO
from benchmarks.peers.__main__ import RESULTS
from benchmarks.peers.cases import CASES, Case, letters
from benchmarks.peers.collect import collect_runs, of_rollout, repetition, run
from benchmarks.peers.judges import JUDGES, KL_BY_POSITION, RLDOCTOR, RLPROBE, RLWATCH, SHOWN, shown, translated
from benchmarks.peers.scalars import scalars_of, write_scalars
from benchmarks.peers.stored import ARCHIVE, facts_of, pack, unpack
from benchmarks.peers.table import TWIN, WEIGHED, markdown, weigh

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text("utf-8"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    unpack(ARCHIVE, runs := tmp_path_factory.mktemp("peers"))
    return runs


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A faulty run of four updates, which the doctor would have halted before the first."""
    folder = tmp_path_factory.mktemp("made") / "lr_zero"
    noted = run(BY_NAME["lr_zero"], tiny_model, folder, updates=4)
    return folder, noted


def test_the_page_shows_what_the_tools_said(results):
    assert markdown(results) in (DOCS / "doctor-peers.md").read_text("utf-8")


def test_the_results_are_of_the_runs_that_are_stored(results, stored):
    assert [r["name"] for r in results["runs"]] == list(BY_NAME)
    for result in results["runs"]:
        assert result["doctor"] == facts_of(stored / result["name"])["doctor"]


def test_every_weight_is_of_something_that_was_said(results):
    said = {(r["name"], tool, f["name"]) for r in results["runs"] for tool in r["tools"] for f in r["tools"][tool]}
    assert WEIGHED.keys() <= said


def test_the_stored_runs_are_long_enough_for_every_check(stored):
    assert min(len(scalars_of(stored / name)) for name in BY_NAME) >= 120


def test_a_run_goes_on_after_the_doctor_spoke(made):
    folder, noted = made
    assert [(f.cause, f.reaction, f.updates) for f in noted] == [("lr_zero", "halt", 0)]
    rows = scalars_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {row["policy/learning_rate"] for row in rows} == {0.0}
    facts = facts_of(folder)
    assert facts["settings"]["learning_rate"] == 0.0
    assert facts["doctor"][0]["message"].startswith("The learning rate is 0")


def test_a_run_has_what_the_tools_are_shown_and_no_wall_times(made):
    columns = {name for row in scalars_of(made[0]) for name in row}
    assert SHOWN - {"val/reward"} <= columns
    assert sum(name.startswith(KL_BY_POSITION) for name in columns) >= 2
    assert not any(name.startswith(("time/", "throughput/")) for name in columns)


def test_a_run_that_ends_early_is_refused(tiny_model, tmp_path):
    with pytest.raises(RuntimeError, match=r"expected nan to go on for 2 updates, but(.|\n)*the loss is not finite"):
        run(Case("nan", "NaN", prepare=ZOO["logits_overflow"].inject), tiny_model, tmp_path / "nan", updates=2)
    assert not (tmp_path / "nan").exists()


def test_a_fault_that_changes_nothing_is_refused(tiny_model, tmp_path):
    # As many prompts as samples would be needed.
    with pytest.raises(RuntimeError, match="expected a fault in square, but nothing was there to change"):
        run(Case("square", "square", prepare=ZOO["groups_transposed"].inject), tiny_model, tmp_path / "x", updates=2)


def test_collecting_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    made = []

    def noted(case, model, folder, updates, code):
        made.append(case.name)
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"code": code, "updates": updates}))
        return []

    monkeypatch.setattr("benchmarks.peers.collect.run", noted)
    names = ["lr_zero", TWIN]
    missing = collect_runs(tmp_path, names, updates=2)
    assert set(missing) == set(BY_NAME) - set(names)
    assert "the doctor: nothing" in capsys.readouterr().out
    collect_runs(tmp_path, ["lr_zero", "loss_sign"], updates=2)
    assert made == ["lr_zero", TWIN, "loss_sign"]
    assert f"{'lr_zero':<36} is there" in capsys.readouterr().out
    # Longer, by other code, or because it is asked for.
    collect_runs(tmp_path, ["lr_zero"], updates=4)
    monkeypatch.setattr("benchmarks.peers.collect.code_digest", lambda *files: "another")
    collect_runs(tmp_path, ["lr_zero"], updates=4)
    collect_runs(tmp_path, ["lr_zero"], updates=4, fresh=True)
    assert made[3:] == ["lr_zero"] * 3


def test_unknown_runs_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown runs: nothing; known: old_is_current, lr_zero"):
        collect_runs(tmp_path, ["nothing"])


def test_packed_runs_come_out_as_they_went_in(made, tmp_path):
    folder, _ = made
    pack(folder.parent, [folder.name], tmp_path / "runs.zip")
    unpack(tmp_path / "runs.zip", tmp_path / "out")
    for name in ("metrics.csv", "run.json"):
        assert (tmp_path / "out" / folder.name / name).read_bytes() == (folder / name).read_bytes()
    pack(tmp_path / "out", [folder.name], tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "runs.zip").read_bytes()


def test_the_scalars_of_a_run_are_one_row_for_each_update(tiny_model, tmp_path):
    short_run(tiny_model, tmp_path, CSVLogger(tmp_path, name="", version=""), updates=2, max_epochs=2)
    rows = scalars_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1]
    # An update's own value stays, the epoch's stands in each of its updates.
    assert rows[0]["ppo/ratio_std"] != rows[1]["ppo/ratio_std"]
    assert rows[0]["reward/mean"] == rows[1]["reward/mean"] != rows[2]["reward/mean"]
    # A validation is one observation.
    assert ["val/reward" in row for row in rows] == [False, True, False, True]


def test_written_scalars_are_read_alike(tmp_path):
    rows = [
        {"step": 0.0, "epoch": 0.0, "policy/grad_norm": 0.1234567, "loss": float("nan")},
        {"step": 1.0, "epoch": 0.0, "policy/grad_norm": 2.0, "val/reward": 1.0, "time/rollout_seconds": 3.0},
    ]
    write_scalars(tmp_path, rows, ["epoch", "loss", "policy/grad_norm", "step", "val/reward"])
    first, second = scalars_of(tmp_path)
    assert first["policy/grad_norm"] == 0.123457
    assert first["loss"] != first["loss"]
    assert "val/reward" not in first
    assert second == {"step": 1.0, "epoch": 0.0, "policy/grad_norm": 2.0, "val/reward": 1.0}


def test_a_run_without_updates_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,val/reward\n0,0,1.0\n")
    with pytest.raises(ValueError, match="expected updates in .*metrics.csv, but no row has 'policy/grad_norm'"):
        scalars_of(tmp_path)


def test_a_tool_gets_its_own_names():
    row = {"reward/mean": 0.5, "ppo/ratio_p95": 1.5, "something": 1.0}
    assert translated(row, RLPROBE) == {"reward_mean": 0.5, "ratio_p95": 1.5}
    assert translated(row, RLDOCTOR) == {"reward": 0.5}
    assert translated(row, RLWATCH) == {"reward_mean": 0.5}


def test_the_rewards_of_a_rollout_are_shown_once(made):
    run = shown(made[0])
    given = [run.new_rewards(step) for step in range(4)]
    assert [len(rewards) for rewards in given] == [32, 0, 32, 0]
    assert given[2] == run.rewards[1]


class Run:
    def __init__(self, name, healthy=False):
        self.name, self.title, self.healthy, self.causes = name, name, healthy, (name,)


def finding(name, alarm=True):
    return {"name": name, "alarm": alarm}


def test_what_is_said_of_the_healthy_twin_too_is_no_symptom():
    said = {
        "fault": {"rlwatch": [finding("kl"), finding("loss"), finding("note", alarm=False)]},
        TWIN: {"rlwatch": [finding("kl")]},
    }
    fault, twin = weigh(said, {"fault": [], TWIN: []}, [Run("fault"), Run(TWIN, healthy=True)])
    assert [f["worth"] for f in fault["tools"]["rlwatch"]] == ["as in the healthy run", "symptom", "information"]
    assert [f["worth"] for f in twin["tools"]["rlwatch"]] == ["alarm"]


def groups():
    return [make_group([make_episode([n], reward) for n, reward in enumerate(r)]) for r in ([0.0, 1.0], [3.0, 5.0])]


def test_the_table_says_when_the_doctor_named_the_cause():
    note = {"cause": "fault", "reaction": "halt", "updates": 1}
    weighed = weigh({"fault": {}, TWIN: {}}, {"fault": [note], TWIN: [note]}, [Run("fault"), Run(TWIN, healthy=True)])
    for weighed_run in weighed:
        weighed_run["tools"] = {tool: [] for tool in JUDGES}
    table = markdown({"versions": dict.fromkeys(JUDGES, "1"), "runs": weighed})
    assert "| fault | silent | silent | silent | cause: `fault`, after 1 update, halt |" in table
    assert f"| {TWIN} | silent | silent | silent | alarm: `fault`, after 1 update, halt |" in table


def test_scalars_of_a_rollout():
    scalars = of_rollout(groups())
    assert scalars["reward/min"] == 0.0
    assert scalars["reward/max"] == 5.0
    assert scalars["group/reward_std_mean"] == 0.75


def test_repetition_and_rewards_of_texts():
    assert repetition("abcdef") == 0.0
    assert repetition("aaaaaa") == 0.75
    assert repetition("a") == 0.0
    assert letters("abAB.") == 0.5
    assert letters(".") == 0.0

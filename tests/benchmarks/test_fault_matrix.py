"""The proof of the doctor: a small part is run here, and what is committed of the whole must fit this code."""

import json
import re

import pytest

from benchmarks.faults.causes_table import causes_table
from benchmarks.faults.fault import FIRST_SYNC, ZOO
from benchmarks.faults.healthy import CONFIGS, summary, upper_bound
from benchmarks.faults.matrix import KEPT, PICTURE, RESULT, ROOT, SMALL, Journal, collect, run_matrix
from benchmarks.faults.pairs import PAIRS
from benchmarks.faults.runner import code_digest
from benchmarks.faults.table import results, table
from benchmarks.faults.witness import named_by_guard
from grpo_lightning.diagnostics.causes import BY_NAME
from grpo_lightning.errors import LogprobValidationError


@pytest.fixture(scope="module")
def committed():
    return json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return Journal(tmp_path_factory.mktemp("runs") / "small.jsonl", "this")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_small_matrix(name, journal, tiny_model):
    (result,) = run_matrix(journal, tiny_model, only=[name], small=True)
    assert result["named_correctly"], result


def test_results_are_kept(tmp_path):
    journal = Journal(tmp_path / "runs.jsonl", "new")
    journal.add("a", {"got": "x"})
    Journal(tmp_path / "runs.jsonl", "old").add("b", {"got": "y"})
    again = Journal(tmp_path / "runs.jsonl", "new")
    assert again.get("a") == {"key": "a", "code": "new", "digest": code_digest(), "got": "x"}
    assert again.get("b") is None


def test_guards_name_what_they_found():
    assert named_by_guard(LogprobValidationError("all 70 sample-time logprobs are exactly 0.0: the")) == "logprobs_zero"
    assert named_by_guard(LogprobValidationError("all 70 sample-time logprobs are exactly -1.0: the")) == (
        "logprobs_constant"
    )
    assert named_by_guard(RuntimeError("something else")) == ""


def test_the_zoo_is_whole():
    assert len(ZOO) >= 45
    assert all(fault.expected and set(fault.expected) <= set(BY_NAME) for fault in ZOO.values())
    assert len(PAIRS) == 10
    assert {part for parts in PAIRS.values() for part in parts} <= set(ZOO)
    assert len(CONFIGS) >= 8


def test_every_fault_is_in_the_committed_matrix(committed):
    faults = {fault["name"]: fault for fault in committed["faults"]}
    assert list(faults) == list(ZOO)
    for name, fault in ZOO.items():
        assert faults[name]["accepted"] == list(fault.expected)
        assert faults[name]["deadline"] == fault.deadline.text
        assert faults[name]["expected_reaction"] == fault.reaction
        assert faults[name]["refused_by_guard"] == fault.guard
        assert faults[name]["injected"]


def test_the_states_of_the_code_are_those_of_the_results(committed):
    results = [*committed["faults"], *committed["pairs"]]
    healthy = {code for config in committed["healthy_configs"] for code in config["codes"]}
    assert committed["codes"] == sorted(healthy | {result["code"] for result in results})


def test_every_fault_was_named_in_time(committed):
    assert [f["name"] for f in committed["faults"] if not f["named_correctly"]] == []
    for fault in committed["faults"]:
        assert fault["got"] in fault["accepted"]
        assert fault["updates"] <= fault["deadline_updates"]


def test_the_root_of_every_pair_came_first(committed):
    pairs = {pair["name"]: pair for pair in committed["pairs"]}
    assert list(pairs) == list(PAIRS)
    for name, (root, _) in PAIRS.items():
        assert pairs[name]["got"] in ZOO[root].expected


def test_healthy_runs_were_left_alone(committed):
    assert committed["false_alarms"] == 0
    assert committed["healthy_checks"] >= 2000
    assert committed["healthy_live_steps"] >= 200
    assert len(committed["healthy_configs"]) >= 8
    assert {config["name"] for config in committed["healthy_configs"]} == set(CONFIGS)
    for kind in ("live", "replay"):
        bound = committed[f"false_alarm_rate_upper_95_{kind}"]
        assert bound == pytest.approx(3 / committed[f"healthy_{kind}_steps"], rel=0.02)
    assert committed["healthy_verdicts"] == sum(committed["healthy_verdicts_by_check"].values())
    assert PICTURE.read_bytes().startswith(b"\x89PNG")


def test_aliases_have_reasons():
    assert [f.name for f in ZOO.values() if len(f.expected) > 1] == [
        "gradient_scrambled",
        "greedy_half_of_the_time",
    ]


@pytest.mark.parametrize(
    ("moment", "applied", "met"),
    [("rollout", 1, True), ("step", 2, True), ("sync", 2, True), ("rollout", 2, False), ("sync", 3, False)],
)
def test_the_first_sync_is_before_anything_is_sampled(moment, applied, met):
    assert FIRST_SYNC.met(moment, applied, FIRST_SYNC.updates(2, 16)) is met


def test_the_small_matrix_refuses_what_needs_vllm(journal, tiny_model):
    with pytest.raises(SystemExit, match="raw_logprobs need vLLM"):
        run_matrix(journal, tiny_model, only=["raw_logprobs"], small=True)


def made_by(monkeypatch, path, digest):
    """A journal of what one state of the code makes."""
    monkeypatch.setattr("benchmarks.faults.matrix.code_digest", lambda: digest)
    return Journal(path, "same")


def test_each_result_names_the_state_of_the_code_that_made_it(tmp_path, monkeypatch):
    for name in (*ZOO, *PAIRS):
        digest = "two" if name == "lr_zero" else "one"
        made_by(monkeypatch, tmp_path / "runs.jsonl", digest).add(name, dict.fromkeys(KEPT, name))
    live = {"kind": "live", "steps": 3, "halts": [], "error": "", "warnings": {}, "verdicts": {}}
    for name in CONFIGS:
        made_by(monkeypatch, tmp_path / "steps.jsonl", "two").add(f"{name}/live", live)
    made_by(monkeypatch, tmp_path / "steps.jsonl", "three").add("multi-turn/replay-0", {**live, "kind": "replay"})
    steps = Journal(tmp_path / "steps.jsonl", "same")
    result = collect(Journal(tmp_path / "runs.jsonl", "same"), summary(steps))
    assert {fault["name"]: fault["code"] for fault in result["faults"]} == dict.fromkeys(ZOO, "one") | {
        "lr_zero": "two"
    }
    assert {pair["code"] for pair in result["pairs"]} == {"one"}
    codes = {config["name"]: config["codes"] for config in result["healthy_configs"]}
    assert codes == {name: ["two"] for name in CONFIGS} | {"multi-turn": ["three", "two"]}
    assert result["codes"] == ["one", "three", "two"]
    assert "code" not in result


def test_results_that_are_missing_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no result yet of .*lr_zero"):
        collect(Journal(tmp_path / "runs.jsonl", "same"), {})


def test_upper_bound():
    assert upper_bound(0, 2000) == pytest.approx(1 - 0.05 ** (1 / 2000))
    assert upper_bound(2, 100) == pytest.approx(0.0616, abs=1e-3)


def test_the_table_of_causes_in_the_documentation_is_whole():
    assert f"\n{causes_table()}\n" in (ROOT / "docs" / "howto" / "doctor.md").read_text(encoding="utf-8")


def test_the_table_in_the_documentation_is_the_zoos():
    page = (ROOT / "docs" / "howto" / "doctor-faults.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert shown.strip() == table()


def test_the_results_in_the_documentation_are_those_of_the_committed_matrix(committed):
    page = (ROOT / "docs" / "howto" / "doctor-faults.md").read_text(encoding="utf-8")
    assert results(committed) in " ".join(page.split())

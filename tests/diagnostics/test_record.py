import json
from itertools import pairwise

import pytest
import torch
from doctor_records import MISMATCH, STALE, Clock, content, failed_record, healthy_record, passing, silent

from grpo_lightning.diagnostics import Status, Verdict
from grpo_lightning.diagnostics.conclusion import diagnose
from grpo_lightning.diagnostics.curve import Curve
from grpo_lightning.diagnostics.record import FORMAT, Record, json_value


def add(record, update, *verdicts, reactions=None):
    diagnosis = diagnose(verdicts, reactions or {})
    record.add_verdicts(update, verdicts, diagnosis, str(diagnosis))


def check_of(record, name):
    return next(check for check in content(record)["checks"] if check["check"] == name)


class TestCurve:
    def test_few_points_are_all_kept(self):
        curve = Curve(limit=4)
        for i in range(4):
            curve.add({"update": i}, {"a": i / 2})
        assert curve.columns() == {"update": [0, 1, 2, 3], "a": [0.0, 0.5, 1.0, 1.5]}

    def test_many_are_thinned_evenly_and_the_newest_is_there(self):
        curve = Curve(limit=10)
        for i in range(1000):
            curve.add({"update": i}, {"a": float(i)})
        updates = curve.columns()["update"]
        assert len(updates) <= 11
        assert updates[0] == 0
        assert updates[-1] == 999
        gaps = {b - a for a, b in pairwise(updates[:-1])}
        assert gaps == {128}

    def test_a_run_that_goes_on_is_thinned_like_one_that_did_not_stop(self):
        whole, first, second = Curve(limit=10), Curve(limit=10), Curve(limit=10)
        for i in range(500):
            whole.add({"update": i}, {"a": float(i)})
        for i in range(137):
            first.add({"update": i}, {"a": float(i)})
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.columns() == first.columns()
        for i in range(137, 500):
            second.add({"update": i}, {"a": float(i)})
        assert second.columns() == whole.columns()

    def test_what_is_not_finite_or_not_there_is_none(self):
        curve = Curve()
        curve.add({"update": 0}, {"a": float("nan"), "b": 1.0})
        curve.add({"update": 1}, {"a": 2.0, "b": float("inf")})
        assert curve.columns() == {"update": [0, 1], "b": [1.0, None], "a": [None, 2.0]}

    def test_empty(self):
        assert Curve().columns() == {}


class TestChecks:
    def test_counts_and_updates(self):
        record = Record(Clock())
        for update, verdict in enumerate([silent("canary", "Why."), passing("canary"), STALE, passing("canary")]):
            add(record, update, verdict)
        check = check_of(record, "canary")
        assert (check["passed"], check["failed"], check["no_power"]) == (2, 1, 1)
        assert (check["first_update"], check["last_update"], check["passed_update"]) == (0, 3, 3)
        assert (check["status"], check["silence"]) == ("pass", "Why.")

    def test_a_verdict_without_power_hides_no_other(self):
        record = Record(Clock())
        add(record, 0, STALE)
        add(record, 1, silent("canary", "Too small."))
        check = check_of(record, "canary")
        assert check["status"] == "fail"
        assert check["message"] == STALE.message
        assert [change["status"] for change in content(record)["timeline"]] == ["fail"]

    def test_only_changes_are_on_the_timeline_and_their_number_is_bounded(self):
        record = Record(Clock())
        for update in range(2000):
            add(record, update, STALE if update % 2 else passing("canary"), passing("mismatch"))
        found = content(record)
        assert len(found["timeline"]) == 500
        assert found["timeline_dropped"] == 2001 - 500
        updates = [change["update"] for change in found["timeline"]]
        assert updates[0] == 0
        assert updates[-1] == 1999
        assert updates == sorted(updates)


class TestDiagnosis:
    def test_time_is_lost_since_the_check_last_passed(self):
        clock = Clock()
        record = Record(clock)
        clock.now = 3600.0
        add(record, 1, passing("canary"))
        clock.now = 9000.0
        add(record, 4, STALE, MISMATCH)
        found = content(record)["diagnosis"]
        assert found["hours_lost"] == pytest.approx(1.5)
        assert (found["passed_update"], found["update"], found["cause"]) == (1, 4, "sync_stale")
        assert [symptom["cause"] for symptom in found["explained"]] == ["mismatch"]
        assert found["text"] == str(diagnose([STALE, MISMATCH], {}))
        assert tuple(found["ruled_out"]) == STALE.ruled_out

    def test_or_since_the_start(self):
        clock = Clock()
        record = Record(clock)
        clock.now = 1800.0
        add(record, 0, STALE)
        found = content(record)["diagnosis"]
        assert found["hours_lost"] == pytest.approx(0.5)
        assert found["passed_update"] is None

    def test_the_strongest_stays(self):
        record = Record(Clock())
        add(record, 0, MISMATCH, reactions={"all": "warn"})
        add(record, 1, MISMATCH, reactions={"all": "warn"})
        add(record, 2, MISMATCH, reactions={"all": "log"})
        found = content(record)["diagnosis"]
        assert (found["cause"], found["reaction"], found["times"], found["update"]) == ("mismatch", "warn", 3, 0)
        add(record, 3, STALE)
        add(record, 4, MISMATCH, reactions={"all": "warn"})
        found = content(record)["diagnosis"]
        assert (found["cause"], found["reaction"], found["times"], found["update"]) == ("sync_stale", "halt", 1, 3)

    def test_none_in_a_healthy_run(self):
        assert healthy_record()["diagnosis"] is None


@pytest.mark.parametrize("made", [healthy_record(), failed_record()], ids=["healthy", "failed"])
def test_it_is_json_and_says_its_format(made):
    assert made == json.loads(json.dumps(made, allow_nan=False))
    assert made["format"] == FORMAT


def test_a_resumed_run_goes_on(tmp_path):
    clock = Clock()
    first = Record(clock)
    clock.now = 100.0
    add(first, 1, passing("canary"), STALE, reactions={"all": "warn"})
    first.add_update(1, {"a": 1.0})
    first.add_epoch(1, 2, {"b": 2.0})
    # As a checkpoint keeps it: what torch loads without running code.
    torch.save(first.state_dict(), tmp_path / "state")
    later = Clock()
    later.now = 1e6
    second = Record(later)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert content(second) == content(first)
    later.now += 20.0
    assert content(second)["run"]["seconds"] == pytest.approx(120.0)


def test_json_values():
    made = Verdict("a", Status.PASS, evidence={"b": float("nan")}, ruled_out=("c",))
    assert json_value({1: (float("inf"), True, None, 3), "v": made})["1"] == ["inf", True, None, 3]
    assert json_value(made)["evidence"] == {"b": "nan"}
    assert json_value(torch.tensor(1)) == "tensor(1)"

"""What ``doctor`` prints of a run, what it writes, and the code it ends with."""

import json
import subprocess
import sys

import numpy as np
import pytest
from doctor_records import failed_record, healthy_record
from guessing import byte_ids, guessing_epoch
from trl_logs import trl_history

from grpo_lightning.cli import main
from grpo_lightning.diagnostics.report.files import write_report
from grpo_lightning.trajectories.store import write_epoch


@pytest.fixture
def run(folder):
    """A run's folder with its record, made by a function."""

    def write(record):
        write_report(folder / "a run", record)
        (folder / "a run" / "doctor.html").write_text("old")
        return "a run"

    return write


@pytest.fixture
def log(folder):
    def write(**changes):
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": trl_history(**changes)}))
        return "trainer_state.json"

    return write


class TestRun:
    def test_healthy(self, run, folder, capsys):
        assert main(["doctor", run(healthy_record())]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "No failure was found: 8 checks passed, 1 could not tell."
        assert lines[1].split() == ["check", "result", "passed", "failed", "no", "power", "why"]
        (ratio,) = [line for line in lines if line.startswith("ratio")]
        assert ratio.split()[:5] == ["ratio", "passed", "16", "0", "16"]
        (served,) = [line for line in lines if line.startswith("served adapter")]
        assert "no power" in served
        assert "All weights are trained" in served
        assert lines[-1] == "Report: a run/doctor.html"
        assert "No failure was found." in (folder / "a run" / "doctor.html").read_text()

    def test_failed(self, run, capsys):
        record = failed_record()
        assert main(["doctor", run(record)]) == 1
        out = capsys.readouterr().out
        assert out.startswith(
            "Failure: the engine serves an older version than it reports\n" + record["diagnosis"]["text"]
        )
        assert "\ncanary " in out

    @pytest.mark.parametrize(("reaction", "code", "word"), [("warn", 3, "Warning: "), ("log", 0, "Noted: ")])
    def test_weaker_reactions(self, run, capsys, reaction, code, word):
        record = failed_record()
        record["diagnosis"]["reaction"] = reaction
        assert main(["doctor", run(record)]) == code
        assert capsys.readouterr().out.startswith(word)

    def test_nothing_could_be_judged(self, run, folder, capsys):
        record = healthy_record()
        for check in record["checks"]:
            check.update(status="no power", passed=0, no_power=4)
        assert main(["doctor", run(record)]) == 3
        words = "Nothing could be judged"
        assert capsys.readouterr().out.startswith(f"{words}: no check failed, and none of 9 had the data to pass.")
        assert words in (folder / "a run" / "doctor.html").read_text()

    @pytest.mark.parametrize(("updates", "said"), [(32, ""), (33, "record of update 32; metrics.csv goes to 33\n")])
    def test_a_record_that_is_older_than_the_metrics(self, run, folder, capsys, updates, said):
        path = run(healthy_record())
        rows = "".join(f"{step},0.5\n" for step in range(updates))
        (folder / path / "metrics.csv").write_text("step,reward/mean\n" + rows)
        assert main(["doctor", path]) == 0
        assert capsys.readouterr().err == said

    def test_a_file_that_cannot_be_written(self, run, folder, capsys):
        (folder / "file").touch()
        assert main(["doctor", run(healthy_record()), "--output", "file/folder"]) == 1
        assert capsys.readouterr().err.startswith("error: ")

    def test_json(self, run, capsys):
        record = failed_record()
        assert main(["doctor", run(record), "--json"]) == 1
        assert json.loads(capsys.readouterr().out) == record

    def test_output(self, run, folder, capsys):
        record = healthy_record()
        assert main(["doctor", run(record), "--output", "else/where"]) == 0
        assert json.loads((folder / "else" / "where" / "doctor.json").read_text()) == record
        assert (folder / "a run" / "doctor.html").read_text() == "old"
        assert capsys.readouterr().out.endswith("Report: else/where/doctor.html\n")

    def test_neither_torch_nor_lightning_is_needed(self, run):
        code = (
            f"import sys; from grpo_lightning.cli import main; main(['doctor', {run(healthy_record())!r}]); "
            "print([m for m in ('torch', 'lightning', 'numpy', 'pyarrow') if m in sys.modules])"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]"


METRICS = "epoch,step,reward/mean,reward/std,policy/grad_norm,ppo/ratio_std,ppo/updates_since_sampling\n"


class TestRunWithoutRecord:
    @pytest.fixture
    def run(self, folder):
        def write(std):
            (folder / "run").mkdir()
            rows = "".join(f"{i},{2 * i},,,0.5,{std},\n{i},{2 * i + 1},0.5,0.3,,{std},1\n" for i in range(4))
            (folder / "run" / "metrics.csv").write_text(METRICS + rows)
            return folder / "run"

        return write

    def test_its_metrics_are_examined(self, run, capsys):
        assert main(["doctor", str(run(0.006))]) == 0
        out = capsys.readouterr().out
        assert "No power, because a log of scalars does not hold what they need: " in out
        assert "token sources" in out

    def test_and_no_record_is_made_up(self, run, folder):
        path = run(0.0)
        assert main(["doctor", str(path)]) == 1
        assert {file.name for file in path.iterdir()} == {"metrics.csv", "doctor.html"}
        assert "the doctor left no record" in (path / "doctor.html").read_text()

    def test_stored_log_ratios_are_shown(self, run, capsys):
        path = run(0.006)
        epoch = guessing_epoch(0, byte_ids, groups=2, size=2)
        write_epoch(path, epoch)
        assert main(["doctor", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["parts"]["sampling"]["log_ratio_histograms"]
        assert sum(found["by_k"]["all"]) == int(np.isfinite(epoch.log_ratios).sum()) > 0


class TestLog:
    def test_healthy(self, log, folder, capsys):
        before = set(folder.iterdir())
        assert main(["doctor", "--trl", log()]) == 0
        assert set(folder.iterdir()) - before == {folder / "trainer_state.json"}
        assert capsys.readouterr().out.endswith("Report: --output FOLDER writes it\n")

    def test_failure_with_the_time_that_was_lost(self, log, folder, capsys):
        assert main(["doctor", "--trl", log(learning_rate=0.0), "--output", "report"]) == 1
        assert capsys.readouterr().out.startswith("Failure: the learning rate is 0\n")
        record = json.loads((folder / "report" / "doctor.json").read_text())
        assert record["diagnosis"]["hours_lost"] == pytest.approx(0.2)
        assert "0.2 h" in (folder / "report" / "doctor.html").read_text()

    def test_warning(self, log):
        assert main(["doctor", "--trl", log(completions__clipped_ratio=1.0)]) == 3

    def test_updates_per_rollout(self, log):
        assert main(["doctor", "--trl", log(ratio_std=0.0)]) == 0
        assert main(["doctor", "--trl", log(ratio_std=0.0), "--updates-per-rollout", "1"]) == 0
        assert main(["doctor", "--trl", log(ratio_std=0.0), "--updates-per-rollout", "2"]) == 1

    def test_csv(self, folder, capsys):
        (folder / "export.csv").write_text("Step,a - train/learning_rate\n1,0\n2,0\n3,0\n")
        assert main(["doctor", "--trl", "export.csv", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["source"] == "csv"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected either the folder of a run or --trl LOG"),
        (["a run", "--trl", "x"], "expected either the folder of a run or --trl LOG"),
        (["nowhere"], "expected the folder of a run, but there is none at nowhere"),
        (["."], "expected doctor.json or metrics.csv in ., but there is neither"),
        (["--trl", "nowhere"], "expected a log, but there is nothing at nowhere"),
        (["--trl", "log.csv", "--updates-per-rollout", "0"], "expected --updates-per-rollout of 1 or more, but got 0"),
        (["--trl", "log.csv", "--output", "log.csv"], "expected a folder to write to, but --output log.csv is a file"),
    ],
)
def test_refused(folder, capsys, args, message):
    (folder / "log.csv").write_text("reward\n1\n")
    assert main(["doctor", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it cannot be read: Expecting"),
        ("[]", "but got 'list'"),
        ('{"format": 2, "checks": []}', "expected format 1 of the doctor's record in a run/doctor.json, but got 2"),
        ('{"format": 1}', "it is damaged: the record has no 'run'; delete it"),
        ('{"format": 1, "run": {"seconds": NaN}}', "it cannot be read: NaN is no JSON"),
    ],
)
def test_a_record_that_cannot_be_read(folder, capsys, content, message):
    (folder / "a run").mkdir()
    (folder / "a run" / "doctor.json").write_text(content)
    assert main(["doctor", "a run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(diagnosis="sync_stale"), "diagnosis is 'sync_stale', not an object"),
        (lambda r: r.pop("diagnosis"), "the record has no 'diagnosis'"),
        (lambda r: r["diagnosis"].pop("title"), "diagnosis has no 'title'"),
        (lambda r: r["diagnosis"].update(reaction="shout"), "'reaction' of diagnosis is 'shout', not one of halt, log"),
        (lambda r: r["checks"].append("ratio"), "is 'ratio', not an object"),
        (lambda r: r["checks"][0].pop("silence"), "checks[0] has no 'silence'"),
        (lambda r: r["checks"][0].update(passed="often"), "'passed' of checks[0] is 'often', not of type int"),
        (lambda r: r["run"].pop("updates"), "run has no 'updates'"),
        (lambda r: r["curves"].update(updates=3), "it is damaged: "),
    ],
)
def test_a_damaged_record(folder, capsys, damage, message):
    record = failed_record()
    damage(record)
    (folder / "a run").mkdir()
    (folder / "a run" / "doctor.json").write_text(json.dumps(record))
    assert main(["doctor", "a run"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_no_missing_key_ends_in_a_traceback(folder, capsys):
    (folder / "a run").mkdir()
    for of in (lambda r: r, lambda r: r["run"], lambda r: r["diagnosis"], lambda r: r["checks"][0]):
        for key in of(failed_record()):
            record = failed_record()
            del of(record)[key]
            (folder / "a run" / "doctor.json").write_text(json.dumps(record))
            assert main(["doctor", "a run"]) in (1, 2), key

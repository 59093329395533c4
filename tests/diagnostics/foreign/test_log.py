"""Reading other trainers' logs: what is known of them, and one clear message where nothing is."""

import json
import math

import pytest
from trl_logs import trl_history

from grpo_lightning.diagnostics.foreign.log import read_log
from grpo_lightning.errors import ConfigurationError


@pytest.fixture
def file(tmp_path):
    def write(content, name="log.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


class TestTRL:
    def test_a_trainer_state(self, file):
        log = read_log(file({"global_step": 40, "log_history": trl_history()}, "trainer_state.json"))
        assert len(log.values("reward/mean")) == 40
        assert log.rows[0][0] == 1
        assert log.values("mismatch/logprob_abs_mean")[0] == pytest.approx(0.013, abs=0.002)
        assert log.seconds == 720.0

    def test_the_time_of_one_that_goes_on_is_the_sum_of_its_steps(self, file):
        rows = [row for row in trl_history() if row["step"] % 5 == 0][:-1]
        assert read_log(file({"log_history": rows}, "a.json")).seconds == pytest.approx(40 * 12.0)

    def test_a_folder_with_checkpoints(self, file, tmp_path):
        file({"log_history": trl_history(9)}, "checkpoint-9/trainer_state.json")
        file({"log_history": trl_history(10)}, "checkpoint-10/trainer_state.json")
        assert len(read_log(tmp_path).values("loss")) == 10
        assert len(read_log(tmp_path / "checkpoint-9").values("loss")) == 9

    def test_evaluation_and_missing_values_are_left_out(self, file):
        rows = [{"reward": None, "step": 1}, {"eval_reward": 3.0, "step": 1}, {"reward": 1.0, "step": 2}]
        assert read_log(file({"log_history": rows}, "a.json")).values("reward/mean") == [1.0]

    def test_nan(self, file):
        log = read_log(file('{"log_history": [{"loss": NaN, "grad_norm": "NaN", "reward": Infinity}]}', "a.json"))
        assert math.isnan(log.values("loss")[0])
        assert math.isnan(log.values("policy/grad_norm")[0])
        assert log.values("reward/mean") == [math.inf]
        assert log.finite("loss") == []


class TestCSV:
    def test_our_metrics(self, file):
        text = (
            "epoch,step,reward/mean,policy/grad_norm,time/rollout_seconds,time/train_seconds\n"
            "0,0,,0.5,,\n0,1,0.25,,60,30\n1,3,nan,,50,\n"
        )
        log = read_log(file(text))
        assert log.values("policy/grad_norm") == [0.5]
        assert log.finite("reward/mean") == [0.25]
        assert log.seconds == 140.0
        assert [step for step, _ in log.rows] == [0, 1, 3]

    def test_a_rollout_beside_the_training_counts_as_far_as_it_was_waited_for(self, file):
        text = "step,reward/mean,time/rollout_seconds,time/rollout_wait_seconds,time/train_seconds\n1,0.5,60,5,90\n"
        assert read_log(file(text)).seconds == 95.0

    def test_an_export_of_wandb(self, file):
        text = '"Step","a run - train/reward","a run - train/reward__MIN","a run - train/reward__MAX"\n1,0.5,0.1,0.9\n'
        log = read_log(file(text))
        assert log.rows == ((1.0, {"reward/mean": 0.5}),)

    def test_of_several_names_the_best(self, file):
        assert read_log(file("clip_ratio,clip_ratio/region_mean\n1,2\n")).values("ppo/clip_fraction") == [2.0]

    def test_without_steps_and_with_a_byte_order_mark(self, file):
        assert [s for s, _ in read_log(file("\ufeffreward\n1\n2\n")).rows] == [0.0, 1.0]


REFUSED = {
    "empty": ("", "a.json", "but the file is empty"),
    "blank": (" \n", "a.csv", "but the file is empty"),
    "no JSON": ("step,reward\n1,2\n", "a.json", "expected JSON in .* a CSV file must end in .csv"),
    "deep JSON": ("[" * 100000, "a.json", "expected JSON in"),
    "no history": ('{"epoch": 1, "step": 3}', "a.json", "with log_history, but got: epoch, step"),
    "a number": ("3", "a.json", "with log_history, but got: int"),
    "no entries": ('{"log_history": []}', "a.json", "there are none; set logging_steps=1"),
    "not entries": ('{"log_history": [1, 2]}', "a.json", "with log_history"),
    "no rows": ("step,reward\n", "a.csv", "expected rows below the names"),
    "unknown names": ("foo,bar\n1,2\n", "a.csv", "such as reward, kl, .* but got: foo, bar$"),
    "names nearly known": (
        "step,rewrd,grad_nrm\n1,2,3\n",
        "a.csv",
        "did you mean 'reward' by 'rewrd', 'grad_norm' by 'grad_nrm'\\?",
    ),
    "text": ("step,reward\n1,high\n", "a.csv", "expected numbers under 'reward' in .*, but entry 1 holds 'high'"),
    "a list": ('{"log_history": [{"reward": [1]}]}', "a.json", "entry 1 holds '\\[1\\]'"),
    "a truth": ('{"log_history": [{"reward": true}]}', "a.json", "entry 1 holds 'True'"),
    "two runs": ("Step,a - reward,b - reward\n1,2,3\n", "a.csv", "expected one run in .* holds 2: a, b; export them"),
    "a step that is NaN": ('{"log_history": [{"step": NaN, "reward": 1}]}', "a.json", "finite steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(file, name):
    content, path, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=message):
        read_log(file(content, path))


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigurationError, match="there is nothing at"):
        read_log(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="expected trainer_state.json in .* or in its checkpoint-"):
        read_log(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_log(tmp_path / "a.csv")

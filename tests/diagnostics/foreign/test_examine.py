"""Logs of scalars: what they show is named, and what healthy runs show too is not."""

import math

import pytest
from trl_logs import trl_history

from benchmarks.faults.fault import ZOO
from benchmarks.peers.cases import CASES
from benchmarks.peers.stored import ARCHIVE, unpack
from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.beyond_a_log import BEYOND_A_LOG
from grpo_lightning.diagnostics.causes import CAUSES
from grpo_lightning.diagnostics.conclusion import diagnose
from grpo_lightning.diagnostics.foreign.examine import examine_log
from grpo_lightning.diagnostics.foreign.log import NAMES, Log, read_log
from grpo_lightning.diagnostics.foreign.record import foreign_record

OURS = {alias: name for name, aliases in NAMES.items() for alias in aliases}
MISMATCH = "sampling__sampling_logp_difference__mean"


def trl_log(steps=40, **changes):
    rows = trl_history(steps, **changes)
    return Log(tuple((row["step"], {OURS[k]: v for k, v in row.items() if k in OURS}) for row in rows))


def examined(log, updates=None):
    verdicts, reactions = examine_log(log, updates)
    return {verdict.check: verdict for verdict in verdicts}, diagnose(verdicts, reactions)


def varying(step):
    return step % 2 / 2


HEALTHY = {
    "TRL's defaults": {},
    "warm-up from 0": {"learning_rate": lambda step: 1e-7 * (step - 1)},
    "decay to 0": {"learning_rate": lambda step: 1e-7 * max(0, 30 - step)},
    "a task that is solved": {
        "frac_reward_zero_std": lambda step: 0.5 if step < 10 else 1.0,
        "reward_std": lambda step: 0.3 if step < 10 else 0.0,
        "reward": lambda step: min(1.0, step / 10),
        "grad_norm": lambda step: 0.2 if step < 10 else 0.0,
        "entropy": lambda step: max(0.001, 1 - step / 10),
    },
    "KL in the loss": {"kl": lambda step: 1e-5 * (step - 1)},
    "KL that rounds to 0 at first": {"kl": lambda step: 1e-7 * max(0, step - 12)},
    "several updates": {"clip_ratio__region_mean": lambda step: 0.002 * (step % 4)},
    "several updates, small ones": {"ratio_std": lambda step: 0.02 * varying(step) + 3e-7},
    "several updates, tiny ones": {"ratio_std": 9e-6},
    "several updates, with a KL": {"kl": lambda step: 1e-4 * step},
    "several updates on a task solved from the start": {
        "ratio_std": 5e-7,
        "frac_reward_zero_std": lambda step: float(step > 2),
        "reward_std": lambda step: 0.3 * (step <= 2),
        "grad_norm": 0.0,
        "kl": 0.0,
    },
    "skipped steps of mixed precision": {"grad_norm": lambda step: math.inf if step in (1, 2, 20) else 0.2},
    "bfloat16": {MISMATCH: 0.05},
    "fp8 or a mixture of experts": {MISMATCH: 0.2},
    "a mismatch that fluctuates": {MISMATCH: lambda step: 0.02 + 0.05 * varying(step)},
    "no vLLM": {MISMATCH: None},
    "a norm that DeepSpeed logs wrongly": {"grad_norm": 0.0, "kl": lambda step: 1e-5 * step},
    "no rewards differ yet": {"frac_reward_zero_std": lambda step: float(step < 39), "grad_norm": 0.0, "kl": 0.0},
    "long completions": {"completions__clipped_ratio": lambda step: 0.9 + 0.1 * varying(step)},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_alone(name):
    found, diagnosis = examined(trl_log(**HEALTHY[name]), 4 if name.startswith("several") else None)
    assert diagnosis is None, str(diagnosis)
    assert found["rewards"].status is Status.PASS


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_log_decides_nothing(steps):
    faults = {"learning_rate": 0.0, "grad_norm": 0.0, "frac_reward_zero_std": 1.0, MISMATCH: 3.0, "kl": 0.0}
    assert examined(trl_log(steps, **faults))[1] is None


FAULTS = {
    "learning rate": ({"learning_rate": 0.0}, "lr_zero", "halt"),
    "gradient": ({"grad_norm": 0.0}, "gradient_zero", "warn"),
    "gradient and KL": ({"grad_norm": 0.0, "kl": 0.0}, "gradient_zero", "halt"),
    "gradient is NaN": (
        {"grad_norm": lambda step: math.nan if step > 20 else 0.2},
        "gradient_not_finite",
        "halt",
    ),
    "loss is NaN": ({"loss": math.nan}, "not_finite", "halt"),
    "rewards": ({"frac_reward_zero_std": 1.0, "reward_std": 0.0, "grad_norm": 0.0}, "rewards_constant", "warn"),
    "mismatch from the start": ({MISMATCH: 0.8}, "mismatch", "halt"),
    "mismatch that grows": ({MISMATCH: lambda step: 0.01 * step}, "other_weights", "warn"),
    "sampler": ({MISMATCH: 0.0}, "logprobs_copied", "warn"),
    "KL": ({"kl": 0.0}, "policy_frozen", "halt"),
    "entropy": ({"entropy": lambda step: 2.0 / step**2, "reward": 0.3}, "policy_collapsed", "warn"),
    "endings": ({"completions__clipped_ratio": 1.0}, "never_stops", "warn"),
    "ratio": ({"ratio_std": 0.0}, "old_recomputed", "halt"),
    "clip fraction": ({"clip_ratio__region_mean": 0.0, "kl": 0.0}, "policy_frozen", "halt"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name):
    changes, cause, reaction = FAULTS[name]
    _, diagnosis = examined(trl_log(**changes), updates=4 if name in ("ratio", "clip fraction") else None)
    assert diagnosis.root.cause == cause
    assert diagnosis.reaction == reaction
    assert diagnosis.root.message
    assert diagnosis.root.fix
    assert diagnosis.root.evidence


def test_the_cause_comes_before_its_symptoms():
    _, diagnosis = examined(trl_log(learning_rate=0.0, kl=0.0))
    assert diagnosis.root.cause == "lr_zero"
    assert [verdict.cause for verdict in diagnosis.explained] == ["policy_frozen"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    if not ARCHIVE.is_file():
        pytest.skip(f"{ARCHIVE.name} is not there yet: python -m benchmarks.peers collect writes it")
    unpack(ARCHIVE, runs := tmp_path_factory.mktemp("peers"))
    return runs


HEALTHY_RUNS = [case.name for case in CASES if case.healthy]


@pytest.mark.parametrize("name", HEALTHY_RUNS)
def test_stored_healthy_runs_are_left_alone(name, stored):
    diagnosis = foreign_record(read_log(stored / name / "metrics.csv"), "metrics")["diagnosis"]
    if name == "solved":
        # A reward that is always the same looks alike.
        assert (diagnosis["cause"], diagnosis["reaction"], diagnosis["explained"]) == ("rewards_constant", "warn", [])
    else:
        assert diagnosis is None


@pytest.mark.parametrize("name", ["old_is_current", "lr_zero"])
def test_stored_faulty_runs_are_named(name, stored):
    diagnosis = foreign_record(read_log(stored / name / "metrics.csv"), "metrics")["diagnosis"]
    assert diagnosis["cause"] == ZOO[name].expected[0]


class TestClipping:
    """Nothing is ever clipped, with four updates for each rollout."""

    def test_where_nothing_tells_whether_the_policy_moves(self):
        found, diagnosis = examined(trl_log(), updates=4)
        assert diagnosis is None
        assert found["clip fraction"].status is Status.NO_POWER
        assert "right where steps are small" in found["clip fraction"].message

    @pytest.mark.parametrize("moves", [{"ratio_std": 0.022}, {"kl": lambda step: 1e-5 * step}])
    def test_small_steps_pass(self, moves):
        assert examined(trl_log(**moves), updates=4)[0]["clip fraction"].status is Status.PASS

    @pytest.mark.parametrize("stands", [{"ratio_std": 5e-7}, {"kl": 0.0}])
    def test_a_policy_that_stands_still_fails(self, stands):
        found, _ = examined(trl_log(**stands), updates=4)
        assert found["clip fraction"].cause == "policy_frozen"

    def test_but_not_where_no_rewards_differ(self):
        found, _ = examined(trl_log(ratio_std=5e-7, frac_reward_zero_std=1.0), updates=4)
        assert "no rewards differ" in found["clip fraction"].message
        assert "no rewards differ" in found["ratio"].message


class TestRatio:
    def test_one_update_per_rollout_with_a_ratio_of_1_is_healthy(self):
        found, diagnosis = examined(trl_log(ratio_std=0.0), updates=1)
        assert diagnosis is None
        assert found["ratio"].message.startswith("With one update per rollout a ratio of 1 is right.")

    def test_as_it_may_be_where_nobody_says_how_many_there_are(self):
        found, diagnosis = examined(trl_log(ratio_std=0.0))
        assert diagnosis is None
        assert "the log does not say how many there are" in found["ratio"].message

    def test_our_log_says_it(self):
        row = {"ppo/ratio_std": 0.0, "ppo/updates_since_sampling": 3.0, "reward/std": 0.3}
        _, diagnosis = examined(Log(tuple((i, row) for i in range(4))))
        assert diagnosis.root.evidence["updates per rollout"] == 4

    @pytest.mark.parametrize(("std", "status"), [(9e-6, Status.NO_POWER), (0.006, Status.PASS)])
    def test_rounding_is_not_pinned(self, std, status):
        found, diagnosis = examined(trl_log(ratio_std=std, clip_ratio__region_mean=0.01), updates=4)
        assert diagnosis is None
        assert found["ratio"].status is status


def test_every_other_check_says_what_it_needs():
    found, _ = examined(trl_log())
    assert {cause.check for cause in CAUSES} <= set(found)
    beyond = {name for name, verdict in found.items() if verdict.message.startswith(BEYOND_A_LOG)}
    assert {"canary", "token sources", "advantages", "ascent", "ratio"} <= beyond
    assert not {"learning rate", "gradient", "mismatch", "rewards"} & beyond
    assert "who chose each token" in found["token sources"].message


class TestRecord:
    def test_the_whole_run_is_lost_where_its_time_is_known(self):
        log = trl_log(learning_rate=0.0)
        assert foreign_record(log, "trl")["diagnosis"]["hours_lost"] is None
        timed = Log(log.rows, seconds=7200.0)
        assert foreign_record(timed, "trl")["diagnosis"]["hours_lost"] == pytest.approx(2.0)

    def test_curves_have_our_names(self):
        made = foreign_record(trl_log(), "trl")
        curves = made["curves"]["updates"]
        assert curves["update"][:2] == [1, 2]
        assert {"reward/mean", "policy/entropy", "ppo/clip_fraction_low", "completion/length_mean"} <= set(curves)
        assert (made["source"], made["run"]["updates"]) == ("trl", 40)

    def test_the_text_leaves_out_what_no_log_tells(self):
        assert BEYOND_A_LOG not in foreign_record(trl_log(learning_rate=0.0), "trl")["diagnosis"]["text"]

"""Every moment of a run belongs to exactly one phase."""

import copy
import pickle
import threading

import pytest
from fakes import FakeEngine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from runs import MODEL, data, trainer

from grpo_lightning import GRPOModule
from grpo_lightning.callbacks import RunSummary
from grpo_lightning.phases import PHASES, TRAIN_PARTS, PhaseClock, by_phase, time_metrics, train_parts, train_throughput


class Time:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def clock(time):
    return PhaseClock(time)


def test_a_phase_stops_the_clock_of_the_one_around_it(clock, time):
    time.passes(1)
    with clock("rollout") as outer:
        time.passes(2)
        with clock("sync") as inner:
            time.passes(4)
            with clock("doctor"):
                time.passes(8)
        time.passes(16)
    clock.started()
    time.passes(32)
    assert clock.totals() == {"start": 1, "rollout": 18, "sync": 4, "doctor": 8, "other": 32}
    assert (outer.seconds, inner.seconds) == (18, 4)


def test_a_phase_inside_itself_is_counted_once(clock, time):
    with clock("rollout") as outer:
        time.passes(1)
        with clock("rollout") as inner:
            time.passes(2)
        time.passes(4)
    assert clock.totals() == {"start": 0, "rollout": 7}
    assert (outer.seconds, inner.seconds) == (5, 2)


def test_an_exception_ends_its_phases(clock, time):
    def fails():
        with clock("rollout"), clock("sync"):
            time.passes(1)
            raise ValueError("x")

    with pytest.raises(ValueError, match="^x$"):
        fails()
    time.passes(2)
    assert clock.totals() == {"start": 2, "rollout": 0, "sync": 1}


def test_hooks_that_do_not_come_leave_nothing_open(clock, time):
    clock.end("train")  # nothing is open
    clock.begin("train")
    time.passes(1)
    clock.begin("train")  # the batch before was given up
    time.passes(2)
    with clock("train_forward"):
        time.passes(4)
    clock.begin("validation")
    time.passes(8)
    clock.end("train")  # takes the validation that it began with it
    time.passes(16)
    assert clock.totals() == {"start": 16, "train": 3, "train_forward": 4, "validation": 8}


def test_an_epoch_begins_where_the_last_one_ended(clock, time):
    time.passes(1)
    clock.started()
    with clock("rollout"):
        time.passes(2)
    clock.begin_epoch()
    with clock("train"):
        time.passes(4)
    assert clock.epoch() == {"start": 1, "other": 0, "rollout": 2, "train": 4}
    clock.end_epoch()
    with clock("checkpoint"):
        time.passes(8)
    assert clock.epoch()["train"] == 4, "until the next epoch begins, the numbers are those of this one"
    with clock("rollout"):
        time.passes(16)
    clock.begin_epoch()
    assert clock.epoch() == {"start": 0, "other": 0, "rollout": 16, "train": 0, "checkpoint": 8}


def test_a_resumed_run_goes_on(time):
    first = PhaseClock(time)
    time.passes(1)
    first.started()
    with first("rollout"):
        time.passes(2)
    first.begin_epoch()
    first.end_epoch()
    with first("rollout"):
        time.passes(4)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    time.passes(1000)
    second = PhaseClock(time)
    time.passes(8)
    second.load_state_dict(state)
    second.started()
    second.begin_epoch()
    with second("rollout"):
        time.passes(16)
    assert second.totals() == {"start": 9, "other": 0, "rollout": 22}
    assert second.epoch() == {"start": 8, "other": 0, "rollout": 20}


def test_a_run_begins_anew(clock, time):
    clock.started()
    with clock("rollout"):
        time.passes(1)
        clock.begin_run()
        time.passes(2)
    assert clock.totals() == {"start": 2}


def test_other_threads_overlap(clock, time):
    spans = []

    def work():
        with clock("rollout") as outer, clock("sync") as inner:
            time.passes(2)
        spans.extend([outer, inner])

    with clock("train"):
        time.passes(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert clock.totals() == {"start": 0, "train": 3}
    assert [span.seconds for span in spans] == [0, 2]


def test_a_copy_leaves_the_profiler(time, tmp_path):
    clock = PhaseClock(time)
    profiler = SimpleProfiler(tmp_path, "profile")
    profiler._prepare_streams()  # an open file
    clock.begin_run(profiler)
    with copy.deepcopy(clock)("rollout"):
        pass
    assert not profiler.recorded_durations
    profiler.teardown("fit")


def test_the_numbers():
    seconds = {"rollout": 1.0, "train": 2.0, "train_forward": 4.0, "train_optimizer": 8.0, "other": 16.0}
    phases = by_phase(seconds)
    assert list(phases) == list(PHASES)
    assert {name: value for name, value in phases.items() if value} == {"rollout": 1.0, "train": 14.0, "other": 16.0}
    assert train_parts(seconds) == {"forward": 4.0, "loss": 0.0, "backward": 0.0, "optimizer": 8.0}
    metrics = time_metrics(seconds)
    assert metrics["time/epoch_seconds"] == 31.0
    assert metrics["time/train_seconds"] == 14.0
    assert metrics["time/train_forward_seconds"] == 4.0
    assert len(metrics) == len(PHASES) + len(TRAIN_PARTS) + 1
    speed = train_throughput(4.0, 100.0, 20.0)
    assert speed == {"throughput/train_tokens_per_second": 25.0, "throughput/train_sampled_tokens_per_second": 5.0}


class Wall(Callback):
    """The epochs' numbers, and the wall time that they should explain."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(pl_module.epoch_metrics())


def fitted(tmp_path, tiny_model):
    """A short run: its module, the numbers of its epochs and its seconds."""
    import time

    wall, module = Wall(), GRPOModule(tiny_model, old_logprobs="trainer", **MODEL)
    run = trainer(
        tmp_path,
        callbacks=[wall, RunSummary(plot=False), ModelCheckpoint(tmp_path, save_last=True)],
        enable_checkpointing=True,
        accumulate_grad_batches=2,
    )
    begin = time.perf_counter()
    run.fit(module, data(FakeEngine(), val_size=3))
    return module, wall.epochs, time.perf_counter() - begin


def test_a_run_is_explained(tmp_path, tiny_model):
    module, epochs, _ = fitted(tmp_path, tiny_model)
    totals = module.phases.totals()
    phases = by_phase(totals)
    assert all(value > 0 for value in phases.values()), phases
    assert all(value > 0 for value in train_parts(totals).values()), totals
    first, second = epochs
    assert first["time/start_seconds"] > 0
    assert second["time/start_seconds"] < 0.01
    assert second["time/checkpoint_seconds"] > 0, "the checkpoint of the first epoch came after its numbers"
    assert first["memory/trainer_peak_gib"] > 0.01
    for metrics in epochs:
        assert sum(metrics[f"time/train_{part}_seconds"] for part in TRAIN_PARTS) <= metrics["time/train_seconds"]
        assert metrics["time/epoch_seconds"] == pytest.approx(sum(metrics[f"time/{name}_seconds"] for name in PHASES))
        spent = metrics["time/train_seconds"]
        assert metrics["throughput/train_tokens_per_second"] == pytest.approx(metrics["tokens/input"] / spent)
        assert metrics["throughput/train_sampled_tokens_per_second"] == pytest.approx(metrics["tokens/trained"] / spent)


def test_no_phase_misses_what_belongs_to_it(tmp_path, tiny_model):
    # A pause of the machine falls into one run and one phase; what is not timed is missing in every run.
    missing = {"wall": [], "other": [], "train": [], "rollout": []}
    for attempt in range(4):
        module, epochs, seconds = fitted(tmp_path / str(attempt), tiny_model)
        totals = module.phases.totals()
        missing["wall"].append(abs(seconds - sum(totals.values())) / seconds)
        missing["other"].append(totals["other"] / seconds)
        for metrics in epochs:
            parts = sum(metrics[f"time/train_{part}_seconds"] for part in TRAIN_PARTS)
            missing["train"].append(1 - parts / metrics["time/train_seconds"])
            logged = metrics["tokens/sampled"] / metrics["throughput/rollout_tokens_per_second"]
            missing["rollout"].append(abs(1 - logged / metrics["time/rollout_seconds"]))
    least = {name: min(shares) for name, shares in missing.items()}
    allowed = {"wall": 0.05, "other": 0.25, "train": 0.5, "rollout": 0.2}
    assert all(least[name] < share for name, share in allowed.items()), missing


def test_lightnings_profilers_know_the_phases(tmp_path, tiny_model):
    profiler = SimpleProfiler(tmp_path, "profile")
    run = trainer(tmp_path, profiler=profiler, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    run.fit(GRPOModule(tiny_model, old_logprobs="trainer", **MODEL), data(FakeEngine(), val_size=3))
    (summary,) = tmp_path.glob("fit-profile*.txt")
    text = summary.read_text()
    parts = [f"train_{part}" for part in TRAIN_PARTS]
    for name in ("start", "rollout", "packing", "sync", "rescore", "checkpoint", "doctor", *parts):
        assert f"  [grpo]{name} " in text, name
    assert len(profiler.recorded_durations["[grpo]rollout"]) == 2
    assert len(profiler.recorded_durations["[grpo]train_forward"]) == 2


@pytest.mark.parametrize("kind", [AdvancedProfiler, PyTorchProfiler])
def test_the_other_profilers_take_them_too(tmp_path, tiny_model, kind):
    profiler = kind(tmp_path, "profile")
    trainer(tmp_path, profiler=profiler, max_epochs=1).fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine()))
    assert "[grpo]train_" in "".join(path.read_text() for path in tmp_path.glob("fit-profile*"))

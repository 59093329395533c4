"""An epoch that ends when the policy has gone far enough."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import RecordingEngine
from test_checkpoints import assert_equal_weights, run

from grpo_lightning.early_end import check_max_kl, is_beyond
from grpo_lightning.errors import ConfigurationError

# Four updates an epoch; the second and later ones are far from what was sampled, and end it.
SETTINGS = {
    "module": {"learning_rate": 3e-2, "max_kl": 1e-3},
    "rollout": {"updates_per_rollout": 1, "inner_epochs": 4, "val_size": 2},
}


class Counts(Callback):
    """Notes when validation ran, and after which optimizer steps epochs ended."""

    def __init__(self):
        self.validated, self.ended, self.updates, self.kl = [], [], [], []

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0:
            self.kl.append((trainer.current_epoch, pl_module.current_update().numbers()["ppo/kl_k3"]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.ended.append(trainer.global_step)
        self.updates.append(pl_module.epoch_metrics()["ppo/updates"])


class TestIsBeyond:
    # k3 of a log-ratio d is e^d - d - 1: 0.3068528 at log 2, 0.1931472 at -log 2, so 0.25 on average.
    @pytest.mark.parametrize(
        ("log_ratio", "max_kl", "expected"),
        [
            ([math.log(2), -math.log(2)], 0.2499, True),
            ([math.log(2), -math.log(2)], 0.2501, False),
            ([math.log(2)], 0.3068, True),
            ([math.log(2)], 0.3069, False),
            ([-math.log(2)], 0.1931, True),
            ([-math.log(2)], 0.1932, False),
            ([0.0, 0.0], 1e-12, False),
            ([], 1e-12, False),
        ],
    )
    def test_golden(self, log_ratio, max_kl, expected):
        assert is_beyond(torch.tensor(log_ratio, dtype=torch.float64), max_kl) is expected

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
    def test_the_limit_is_the_metrics(self, log_ratio):
        d = torch.tensor(log_ratio, dtype=torch.float64)
        metric = float((torch.expm1(d) - d).mean())
        if metric > 1e-9:
            assert is_beyond(d, metric * (1 - 1e-9))
        assert not is_beyond(d, metric * (1 + 1e-9) + 1e-300)

    def test_nan_is_not_beyond(self):
        # The loss's own check names it.
        assert not is_beyond(torch.tensor([math.nan, 5.0]), 0.1)

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
    def test_a_limit_that_ends_every_epoch_at_once_is_refused(self, value):
        with pytest.raises(ConfigurationError, match="expected max_kl > 0 in nats a token, or none, but got"):
            check_max_kl(value)

    def test_no_limit(self):
        check_max_kl(None)
        check_max_kl(1e-9)


class TestRun:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_epochs_end_after_the_update_that_went_too_far(self, tmp_path, tiny_model, accumulate):
        counts = Counts()
        keep = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=True)
        policy, notes = run(
            tmp_path, tiny_model, checkpoint=keep, extra=[counts], accumulate_grad_batches=accumulate, **SETTINGS
        )
        # The first update of an epoch is at ratio 1, so at least two are taken, but not all four.
        assert all(2 <= updates < 4 for updates in counts.updates), counts.updates
        assert counts.ended == [sum(map(int, counts.updates[: i + 1])) for i in range(3)]
        assert counts.validated == counts.ended
        assert policy.policy_version == counts.ended[-1]
        assert len(notes.batches) == accumulate * counts.ended[-1]
        assert sorted(p.stem for p in tmp_path.glob("*.ckpt")) == sorted(
            f"epoch={epoch}-step={step}" for epoch, step in enumerate(counts.ended)
        )
        for epoch in range(3):
            *before, last = [kl for e, kl in counts.kl if e == epoch]
            assert last > 1e-3
            assert all(kl <= 1e-3 for kl in before)

    def test_a_limit_that_is_not_reached_changes_nothing(self, tmp_path, tiny_model):
        rollout = SETTINGS["rollout"]
        whole, expected = run(tmp_path, tiny_model, rollout=rollout)
        limited, notes = run(tmp_path, tiny_model, rollout=rollout, module={"max_kl": 1e3})
        assert notes.batches == expected.batches
        assert_equal_weights(whole, limited)

    def test_validation_within_epochs_goes_on(self, tmp_path, tiny_model):
        counts = Counts()
        run(tmp_path, tiny_model, extra=[counts], val_check_interval=0.5, accumulate_grad_batches=1, **SETTINGS)
        assert set(counts.ended) <= set(counts.validated)
        assert len(counts.validated) == len(set(counts.validated))


class TestResume:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("where", ["step", "validation", "epoch"])
    def test_the_next_epoch_follows(self, tmp_path, tiny_model, accumulate, where):
        keep = {
            "step": ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1),
            "validation": ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False),
            "epoch": ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True),
        }[where]
        counts = Counts()
        settings = {"accumulate_grad_batches": accumulate, **SETTINGS}
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, extra=[counts], **settings)
        first = counts.ended[0]
        assert first < 4
        engine, again = RecordingEngine(), Counts()
        path = tmp_path / f"step={first}.ckpt"
        resumed, notes = run(tmp_path, tiny_model, engine=engine, ckpt_path=path, extra=[again], **settings)
        assert notes.batches == expected.batches[accumulate * first :]
        assert {epoch for epoch, *_ in notes.batches} == {1, 2}
        assert again.ended[-2:] == counts.ended[1:]
        assert [e for e in notes.epochs if e["ppo/updates"]][-2:] == expected.epochs[1:]
        assert_equal_weights(whole, resumed)
        assert len(engine.seeds) == 24, "the epoch that was ended is not sampled again"

    def test_from_a_step_before_the_end(self, tmp_path, tiny_model):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        counts = Counts()
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, extra=[counts], **SETTINGS)
        step = counts.ended[1] - 1
        resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / f"step={step}.ckpt", **SETTINGS)
        assert notes.batches == expected.batches[2 * step :]
        assert notes.epochs == expected.epochs[1:]
        assert_equal_weights(whole, resumed)

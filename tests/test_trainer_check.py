"""What cannot work with rollouts is refused by name, before anything expensive."""

from types import SimpleNamespace

import pytest
from fakes import FakeEngine
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from runs import MODEL, data, trainer

from grpo_lightning import GRPOModule
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.trainer_check import another_epoch, check_trainer, epoch_updates


def settings(**changes):
    """A Trainer's settings, where a real one needs hardware that is not here."""
    defaults = {
        "strategy": SingleDeviceStrategy("cpu"),
        "precision": "32-true",
        "reload_dataloaders_every_n_epochs": 1,
        "limit_train_batches": 1.0,
        "accumulate_grad_batches": 1,
        "fast_dev_run": False,
        "overfit_batches": 0.0,
        "callbacks": [],
    }
    return SimpleNamespace(**{**defaults, **changes})


class Renamed:
    pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "16-mixed"}, "16-mixed.*Use 'bf16-mixed'"),
        ({"strategy": FSDPStrategy()}, "got FSDPStrategy: it shards the output head.*'ddp' keeps one frozen copy"),
        ({"strategy": Renamed()}, "got Renamed: it is not tested"),
        ({"reload_dataloaders_every_n_epochs": 2}, "reload_dataloaders_every_n_epochs=1.*inner_epochs"),
        (
            {"limit_train_batches": 5, "accumulate_grad_batches": 3},
            "limit_train_batches to end with a whole optimizer step of 3.* leaves 5 of the epoch's 12.*batches=3",
        ),
        (
            {"limit_train_batches": 0.4, "accumulate_grad_batches": 3},
            "0.4 leaves 4 of the epoch's 12; .*limit_train_batches=3",
        ),
        ({"limit_train_batches": 0.1}, "0.1 leaves 0 of the epoch's 4"),
        (
            {"limit_train_batches": 6, "callbacks": [GradientAccumulationScheduler({0: 1, 2: 4})]},
            "whole optimizer step of 4 micro-batches, but 6 leaves 6 of the epoch's 16",
        ),
        ({"strategy": SingleDeviceStrategy("mps")}, "'mps', which has no float64.*accelerator='cpu'"),
        (
            {"limit_train_batches": 1, "overfit_batches": 1, "accumulate_grad_batches": 2},
            "overfit_batches to end with a whole optimizer step.*overfit_batches=2",
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        check_trainer(settings(**changes), "fit", 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": DDPStrategy()},
        {"precision": "bf16-mixed"},
        {"limit_train_batches": 6, "accumulate_grad_batches": 3},
        {"limit_train_batches": 0.5, "accumulate_grad_batches": 5},
        {"limit_train_batches": 1, "accumulate_grad_batches": 3, "fast_dev_run": 1},
        {"limit_train_batches": 0, "accumulate_grad_batches": 3},
    ],
)
def test_accepted(changes):
    check_trainer(settings(**changes), "fit", 4)


def test_planned_updates_under_a_limit():
    assert epoch_updates(settings(accumulate_grad_batches=3), 4) == 4
    assert epoch_updates(settings(accumulate_grad_batches=3, limit_train_batches=0.5), 4) == 2
    assert epoch_updates(settings(accumulate_grad_batches=3, limit_train_batches=3), 4) == 1


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 4}, True),
        ({"max_epochs": 3}, False),
        ({"max_epochs": None}, True),
        ({"max_epochs": -1}, True),
        ({"max_steps": 15}, True),
        ({"max_steps": 14}, False),
        ({"max_steps": 14, "limit_train_batches": 0.5}, True),
        ({"max_epochs": 3, "max_steps": 100}, False),
    ],
)
def test_whether_another_epoch_is_planned(limits, expected):
    """In the third epoch, after ten steps, of which it has four."""
    loop = SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=2)))
    planned = {"max_epochs": -1, "max_steps": -1, **limits}
    assert another_epoch(settings(**planned, global_step=10, fit_loop=loop), 4) == expected


def test_a_bare_trainers_reload_is_set():
    bare = settings(reload_dataloaders_every_n_epochs=0)
    check_trainer(bare, "validate", 4)
    assert bare.reload_dataloaders_every_n_epochs == 0
    check_trainer(bare, "fit", 4)
    assert bare.reload_dataloaders_every_n_epochs == 1


def test_before_the_engine_starts(tmp_path, tiny_model):
    engine = FakeEngine()
    with pytest.raises(ConfigurationError, match="limit_train_batches"):
        trainer(tmp_path, limit_train_batches=1, accumulate_grad_batches=2).fit(
            GRPOModule(tiny_model, **MODEL), data(engine)
        )
    assert not engine.specs


def test_changing_accumulation_by_hand_is_refused(tmp_path, tiny_model):
    from lightning.pytorch import Callback

    class Change(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.accumulate_grad_batches = 2

    with pytest.raises(
        ConfigurationError,
        match="expected 1 micro-batches per optimizer step.*is 2 by now. Use GradientAccumulationScheduler",
    ):
        trainer(tmp_path, callbacks=[Change()]).fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine()))


def test_an_accumulation_schedule_works(tmp_path, tiny_model):
    run = trainer(tmp_path, max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})])
    run.fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine(), updates_per_rollout=2))
    assert run.global_step == 6
    assert run.num_training_batches == 8

import numpy as np
import pytest
from fakes import FakeEngine
from games import Picky
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from made_epochs import same
from runs import MODEL, data, trainer

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import TrajectoryStore
from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.tasks import SeedTasks
from grpo_lightning.trajectories.store import load_epoch, stored_epochs


class Seen(Callback):
    """What each epoch sampled, and what each update saw, noted apart from the store."""

    def __init__(self):
        self.groups, self.updates = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.groups.append(trainer.datamodule.rollout.groups)
        self.updates.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        evidence = pl_module._evidence[-1]
        self.updates[-1].append((evidence.ledger_index.numpy(), evidence.log_ratio.numpy()))


def fit(tiny_model, folder, *callbacks, module=None, ckpt_path=None, epochs=2, **settings):
    run = trainer(folder, callbacks=list(callbacks), max_epochs=epochs, enable_checkpointing=True)
    source = data(FakeEngine(), updates_per_rollout=2, **settings)
    run.fit(module or GRPOModule(tiny_model, **MODEL), source, ckpt_path=ckpt_path)
    return {epoch: load_epoch(path) for epoch, path in stored_epochs(run_directory(run)).items()}


def test_what_was_sampled_and_what_the_loss_made_of_it(tiny_model, tmp_path):
    seen = Seen()
    stored = fit(tiny_model, tmp_path, TrajectoryStore(), seen, inner_epochs=2, temperature=0.9, bad_words=["!"])
    assert list(stored) == [0, 1]
    for epoch, (groups, updates) in enumerate(zip(seen.groups, seen.updates, strict=True)):
        assert same(stored[epoch].groups, groups)
        assert stored[epoch].origin.version == 4 * epoch
        assert (stored[epoch].temperature, len(stored[epoch].banned_token_ids)) == (0.9, 1)
        expected = np.full(len(stored[epoch].log_ratios), np.nan)
        assert len(updates) == 4
        for rows, log_ratio in updates:
            expected[rows] = log_ratio
        assert same(stored[epoch].log_ratios, expected)
        ledgers = [ledger for group in groups for episode in group.episodes for ledger in episode.ledgers]
        assert np.array_equal(~np.isnan(expected), np.concatenate([ledger.sampled for ledger in ledgers]))
    assert not same(stored[0].log_ratios, stored[1].log_ratios)


def test_episodes_of_several_turns_with_forced_moves(tiny_model, tmp_path):
    seen = Seen()
    run = trainer(tmp_path, callbacks=[TrajectoryStore(), seen], max_epochs=1)
    episodes = EpisodeSettings(max_context=400, truncated_action="step", invalid_action="default")
    source = RolloutDataModule(
        SeedTasks(50),
        environment=Picky,
        engine=FakeEngine(),
        episodes=episodes,
        prompts_per_rollout=4,
        samples_per_prompt=3,
        max_tokens=6,
        max_prompt_tokens=64,
    )
    run.fit(GRPOModule(tiny_model, **MODEL), source)
    stored = load_epoch(stored_epochs(run_directory(run))[0])
    assert same(stored.groups, seen.groups[0])
    ledgers = [ledger for group in stored.groups for episode in group.episodes for ledger in episode.ledgers]
    assert sum(ledger.count(Source.FORCED) for ledger in ledgers) > 0
    assert np.array_equal(~np.isnan(stored.log_ratios), np.concatenate([ledger.sampled for ledger in ledgers]))


class Fails(GRPOModule):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_what_was_sampled_survives_the_training_on_it(tiny_model, tmp_path):
    run = trainer(tmp_path, callbacks=[TrajectoryStore()])
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(Fails(tiny_model, **MODEL), data(FakeEngine()))
    stored = {epoch: load_epoch(path) for epoch, path in stored_epochs(run_directory(run)).items()}
    assert [epoch.log_ratios is None for epoch in stored.values()] == [False, True]


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [({"every_n_epochs": 2}, [0, 2, 4]), ({"keep": 2}, [3, 4]), ({"every_n_epochs": 3, "keep": 1}, [3])],
)
def test_which_epochs_are_kept(tiny_model, tmp_path, settings, epochs):
    stored = fit(tiny_model, tmp_path, TrajectoryStore(**settings), epochs=5)
    assert list(stored) == epochs
    assert all(epoch.log_ratios is not None for epoch in stored.values())


def test_an_epoch_that_goes_on_in_its_middle_is_stored_whole(tiny_model, tmp_path):
    steps = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(tiny_model, tmp_path / "whole", TrajectoryStore(), steps)
    path = tmp_path / "steps" / "step=3.ckpt"
    resumed = fit(tiny_model, tmp_path / "resumed", TrajectoryStore(), ckpt_path=path)
    assert list(resumed) == [1]
    assert same(resumed[1].groups, whole[1].groups)
    # Two of the four groups were trained on before the checkpoint, two after it.
    assert same(resumed[1].log_ratios, whole[1].log_ratios)


@pytest.mark.parametrize("settings", [{"every_n_epochs": 0}, {"keep": 0}])
def test_settings_that_would_store_nothing_are_refused(settings):
    with pytest.raises(ConfigurationError, match="expected every_n_epochs and keep >= 1, but got"):
        TrajectoryStore(**settings)

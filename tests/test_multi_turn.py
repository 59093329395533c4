"""Whole multi-turn runs of a tiny model."""

import pytest
import torch
from fakes import FakeEngine
from games import Echo, Picky
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import MODEL, Gradients, RecordingEngine, trainer

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.errors import LedgerError
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import SeedTasks


def data(engine, environment=Echo, *, episodes=None, **settings):
    defaults = {"prompts_per_rollout": 4, "samples_per_prompt": 3, "max_tokens": 6, "max_prompt_tokens": 64}
    return RolloutDataModule(
        SeedTasks(50),
        environment=environment,
        engine=engine,
        episodes=EpisodeSettings(**{"max_context": 400, "truncated_action": "step", **(episodes or {})}),
        **{**defaults, **settings},
    )


def test_a_run_with_forced_moves(tmp_path, tiny_model):
    run = trainer(tmp_path, max_epochs=2)
    module = data(FakeEngine(), Picky, episodes={"invalid_action": "default"}, val_size=3)
    run.fit(GRPOModule(tiny_model, **MODEL), module)
    episodes = [e for g in module.rollout.groups for e in g.episodes]
    forced = sum(e.count(Source.FORCED) for e in episodes)
    assert forced > 0
    assert run.callback_metrics["tokens/forced"] == forced
    sampled = sum(e.count(Source.SAMPLED) for e in episodes)
    assert run.callback_metrics["tokens/sampled"] == sampled
    assert run.callback_metrics["ppo/ratio_count"] == sampled
    assert run.callback_metrics["episode/turns_max"] > 1
    assert sum(batch.num_targets for batch in module.rollout.batches) == sampled
    assert run.global_step == 2


def test_ratios_of_a_real_model_are_one_in_every_turn(tmp_path, tiny_model):
    run = trainer(tmp_path, max_epochs=1)
    module = data(RecordingEngine())
    run.fit(GRPOModule(tiny_model, **MODEL), module)
    assert run.callback_metrics["ppo/ratio_min"] == pytest.approx(1.0, abs=1e-4)
    assert run.callback_metrics["ppo/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert max(int(batch.turn.max()) for batch in module.rollout.batches) > 0


def test_a_batch_with_a_forced_target_is_refused(tmp_path, tiny_model):
    class Contaminating(GRPOModule):
        def training_step(self, batch, batch_idx):
            source = batch.source.clone()
            source[3] = Source.FORCED
            return super().training_step(batch.replace(source=source), batch_idx)

    with pytest.raises(LedgerError, match="1 of .* tokens in the loss were not sampled by the policy: 1 forced"):
        trainer(tmp_path).fit(Contaminating(tiny_model, **MODEL), data(FakeEngine()))


def test_an_epoch_goes_on_in_its_middle(tmp_path, tiny_model):
    def run(ckpt_path=None, callbacks=()):
        engine, gradients = RecordingEngine(), Gradients()
        fit = trainer(tmp_path, max_epochs=1, callbacks=[gradients, *callbacks], enable_checkpointing=bool(callbacks))
        environment = data(engine, Picky, episodes={"invalid_action": "default"}, updates_per_rollout=2)
        fit.fit(GRPOModule(tiny_model, **MODEL), environment, ckpt_path=ckpt_path)
        return gradients.steps, engine.seeds, environment.rollout.groups

    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _, groups = run(callbacks=[keep])
    rest, asked, restored = run(tmp_path / "step=1.ckpt")
    assert asked == []
    assert restored == groups
    assert any(turn.action.was_forced for group in groups for episode in group.episodes for turn in episode.turns)
    assert len(rest) == 1
    assert torch.equal(rest[0], whole[1])


def test_tasks_are_played_in_the_environment_that_they_name(tmp_path, tiny_model):
    class Short(Echo):
        def __init__(self):
            super().__init__(1)

    class Long(Echo):
        def __init__(self):
            super().__init__(3)

    class Kinds:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return Task(f"t{index}", seed=index, env=("short", "long")[index % 2])

    engine = FakeEngine()
    module = RolloutDataModule(
        Kinds(),
        environment={"short": Short, "long": Long},
        episodes=EpisodeSettings(max_context=400, truncated_action="step"),
        engine=engine,
        prompts_per_rollout=8,
        samples_per_prompt=2,
        max_tokens=6,
        max_prompt_tokens=64,
    )
    trainer(tmp_path, max_epochs=1).fit(GRPOModule(tiny_model, **MODEL), module)
    turns = {group.task.env: {len(episode.turns) for episode in group.episodes} for group in module.rollout.groups}
    assert turns == {"short": {1}, "long": {3}}


def test_predicted_and_held_out_tasks_are_played_too(tmp_path, tiny_model):
    run = trainer(tmp_path)
    module = data(FakeEngine(), lambda: Echo(2), predict_tasks=SeedTasks(3), predict_samples=2, val_size=4)
    policy = GRPOModule(tiny_model, **MODEL)
    (answered,) = run.predict(policy, module)
    assert [len(episode.turns) for group in answered for episode in group.episodes] == [2] * 6
    (scores,) = trainer(tmp_path).validate(policy, module)
    # 1 for the first turn and 2 for the second.
    assert scores["val/reward"] == scores["val/reward_environment"] == 3.0
    assert scores["val/accuracy"] == 1.0

"""Whole multi-turn runs of a tiny model."""

import pytest
from fakes import FakeEngine
from games import Echo, Picky
from runs import MODEL, RecordingEngine, trainer

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.errors import LedgerError
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.ledger import Source
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

"""The founding shape on CPU: Qwen3, LoRA, vLLM, a multi-turn environment with forced actions, W&B; the engine dies."""

import math
import os
from pathlib import Path

import psutil
import pytest
from games import Picky
from lightning.pytorch.loggers import WandbLogger
from real import make_trainer
from wandb_file import history

from grpo_lightning import GRPOModule, RolloutDataModule, VLLMEngine
from grpo_lightning.callbacks import RatioDegeneracyDetector
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.tasks import SeedTasks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class CountedEngine(VLLMEngine):
    """Counts its starts, and dies in the middle of an episode when told so."""

    starts = 0

    def start(self, spec):
        self.starts += self._spec is None
        super().start(spec)

    def die(self):
        children = psutil.Process(os.getpid()).children(recursive=True)
        for process in [p for p in children if "EngineCore" in " ".join(p.cmdline())]:
            process.kill()


class Deadly(Picky):
    """Kills the engine once, in the second turn of an episode of the third rollout."""

    engine: CountedEngine
    armed = False

    async def step(self, action):
        if Deadly.armed and self.taken == 1 and action.policy_version == 2:
            Deadly.armed = False
            Deadly.engine.die()
        return await super().step(action)


class Rollouts(RolloutDataModule):
    """Keeps every rollout's groups."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        self.__dict__.setdefault("made", []).append(self.rollout.groups)
        return loader


def test_the_founding_shape(tmp_path, tiny_qwen3_for_vllm, caplog):
    engine = CountedEngine(dtype="float32")
    Deadly.engine, Deadly.armed = engine, True
    data = Rollouts(
        SeedTasks(40, seed=3),
        environment=Deadly,
        episodes=EpisodeSettings(invalid_action="default", truncated_action="step", max_turns=4, max_context=400),
        engine=engine,
        prompts_per_rollout=4,
        samples_per_prompt=4,
        max_tokens=8,
        max_prompt_tokens=64,
        val_size=2,
    )
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer = make_trainer(
        max_epochs=4,
        logger=logger,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        callbacks=[RatioDegeneracyDetector()],
        check_val_every_n_epoch=4,
    )
    trainer.fit(GRPOModule(tiny_qwen3_for_vllm, dtype="float32", learning_rate=3e-3), data)
    logger.experiment.finish()

    assert trainer.global_step == 4
    # It died once, said so, and was started again with its adapter: nothing was lost.
    assert engine.starts == 2
    assert not Deadly.armed
    assert "the engine died" in caplog.text
    assert "played again" in caplog.text
    assert len(data.made) == 4
    for version, groups in enumerate(data.made):
        episodes = [e for g in groups for e in g.episodes]
        assert len(episodes) == 16
        assert all(e.status != "error" and e.reward is not None and e.attempts == 1 for e in episodes)
        sampled = [ledger.policy_version[ledger.sampled] for e in episodes for ledger in e.ledgers]
        assert {int(v) for versions in sampled for v in versions} == {version}
        assert max(len(e.turns) for e in episodes) > 1
    (path,) = Path(tmp_path, "wandb").glob("*run-*/run-*.wandb")
    rows = [flat for row in history(path) if (flat := _flat(row))]
    epochs = [row for row in rows if "tokens/forced" in row]
    assert len(epochs) == 4
    for row, groups in zip(epochs, data.made, strict=True):
        episodes = [e for g in groups for e in g.episodes]
        assert row["tokens/forced"] == sum(e.count(Source.FORCED) for e in episodes) > 0
        assert row["tokens/sampled"] == row["ppo/ratio_count"] == sum(e.count(Source.SAMPLED) for e in episodes)
        assert row["action/forced_fraction"] > 0
        # The trainer's logprobs of all turns are the engine's: after the restart too, with an adapter that matters.
        assert row["mismatch/logprob_abs_max"] < 1e-3
        assert math.isfinite(row["policy/grad_norm"]) if "policy/grad_norm" in row else True


def _flat(row, prefix=""):
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat

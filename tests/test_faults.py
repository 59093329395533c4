"""Defects put back on the real stack (vLLM, the demo model): each halts with its evidence within three updates.

A part of the fault matrix (`make fault-matrix`), which has many more of them and of healthy runs.
"""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from real import SharedVLLMEngine, fit, make_trainer, zeroed

import grpo_lightning.module
from grpo_lightning.callbacks import LoRAWeightSync, ParameterPerturbation, RatioDegeneracyDetector
from grpo_lightning.errors import DegeneracyError, RatioDegeneracyError, StaleRolloutError
from grpo_lightning.objective import policy_loss

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MAX_UPDATES = 3


@pytest.fixture(scope="module")
def engine():
    engine = SharedVLLMEngine(dtype="float32")
    yield engine
    engine.really_close()


def halted(trainer, error, *fragments):
    assert trainer.global_step <= MAX_UPDATES
    for fragment in fragments:
        assert fragment in str(error.value), str(error.value)


def loss_without_old(objective, inputs):
    """The founding defect: both branches of an if/else computed the current policy's logprobs."""
    return policy_loss(objective, replace(inputs, old_logprobs=inputs.logprobs.detach()))


class RecomputeOld(Callback):
    """The same defect before the loss: the batch's old logprobs are recomputed by the current policy."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            batch.__dict__["old_logprobs"] = pl_module.policy.token_logprobs(batch)[0]


def test_old_logprobs_recomputed_in_the_loss(engine, demo_model, monkeypatch):
    monkeypatch.setattr(grpo_lightning.module, "policy_loss", loss_without_old)
    trainer = make_trainer()
    with pytest.raises(RatioDegeneracyError) as error:
        fit(engine, demo_model, trainer=trainer)
    assert isinstance(error.value, RuntimeError)
    halted(trainer, error, "PPO ratios are degenerate (std=0). Training cannot proceed.", "bit for bit", "Fix:")
    assert trainer.global_step == 0


def test_old_logprobs_recomputed_in_the_batch(engine, demo_model):
    trainer = make_trainer(callbacks=[RecomputeOld()])
    with pytest.raises(RatioDegeneracyError) as error:
        fit(engine, demo_model, trainer=trainer, updates_per_rollout=2)
    halted(trainer, error, "PPO ratios are degenerate (std=0). Training cannot proceed.", "not the ones the sampler")


def test_perturbation_does_not_hide_it(engine, demo_model):
    trainer = make_trainer(callbacks=[ParameterPerturbation(), RecomputeOld()])
    with pytest.raises(RatioDegeneracyError) as error:
        fit(engine, demo_model, trainer=trainer)
    halted(trainer, error, "not the ones the sampler")


def test_sync_that_never_publishes(engine, demo_model):
    class Mute(LoRAWeightSync):
        def publish(self, module, engine):
            if module.policy_version == 0:
                super().publish(module, engine)

    trainer = make_trainer(callbacks=[Mute(), RatioDegeneracyDetector()])
    with pytest.raises(StaleRolloutError) as error:
        fit(engine, demo_model, trainer=trainer)
    halted(trainer, error, "serves policy version 0", "trainer is at version 1", "Mute.publish")


def test_sync_that_pretends(demo_model, engine, monkeypatch):
    load = SharedVLLMEngine.load_adapter
    first = []

    def pretend(self, ref):
        if not first:
            load(self, ref)
            first.append(ref)
        old = first[0]
        self._current = type(ref)(old.name, old.id, old.path, ref.version)

    monkeypatch.setattr(SharedVLLMEngine, "load_adapter", pretend)
    trainer = make_trainer(callbacks=[RatioDegeneracyDetector()])
    with pytest.raises(DegeneracyError) as error:
        fit(engine, demo_model, trainer=trainer)
    halted(trainer, error, "base model although an adapter was published", "alpha", "LoRAWeightSync")


def test_sampler_logprobs_partly_zero_filled(engine, demo_model, monkeypatch):
    generate = SharedVLLMEngine.generate
    count = iter(range(10**6))

    async def faulty(self, *args, **kwargs):
        generation = await generate(self, *args, **kwargs)
        return zeroed(generation) if next(count) % 8 == 0 else generation

    monkeypatch.setattr(SharedVLLMEngine, "generate", faulty)
    trainer = make_trainer()
    with pytest.raises(DegeneracyError) as error:
        fit(engine, demo_model, trainer=trainer)
    halted(trainer, error, "have a stored logprob of 0", "filled in with zeros")
    assert trainer.global_step == 0


class TestHealthyRunsAreLeftAlone:
    def test_one_update_per_rollout(self, engine, demo_model):
        trainer = fit(engine, demo_model)
        assert trainer.global_step == 3
        assert float(trainer.callback_metrics["ppo/ratio_std"]) < 1e-4  # k = 0 in float32: small and right

    def test_four_updates_per_rollout(self, engine, demo_model):
        trainer = fit(engine, demo_model, module={"kl_coef": 0.05}, updates_per_rollout=4)
        assert trainer.global_step == 12
        assert float(trainer.callback_metrics["policy/kl_reference"]) > 0
        assert float(trainer.callback_metrics["ppo/ratio_std"]) > 1e-3
        assert float(trainer.callback_metrics["ppo/updates_since_sampling"]) == 3

    def test_nothing_to_learn_after_a_warm_up_from_zero(self, engine, demo_model):
        trainer = fit(
            engine,
            demo_model,
            trainer=make_trainer(callbacks=[ParameterPerturbation()], max_epochs=2),
            reward=lambda completion: 1.0,
            module={"warmup_updates": 5},
            inner_epochs=3,
        )
        assert trainer.global_step == 6
        assert float(trainer.callback_metrics["group/zero_variance_fraction"]) == 1

    def test_strict_mode_halts_a_healthy_first_update(self, engine, demo_model):
        trainer = make_trainer(callbacks=[RatioDegeneracyDetector(strict=True)])
        with pytest.raises(RatioDegeneracyError) as error:
            fit(engine, demo_model, trainer=trainer)
        halted(trainer, error, "strict mode judges by the std alone", "PPO ratios are degenerate (std=")

    def test_bfloat16(self, demo_model):
        engine = SharedVLLMEngine(dtype="bfloat16")
        try:
            trainer = fit(engine, demo_model, module={"dtype": "bfloat16"}, updates_per_rollout=4)
            assert trainer.global_step == 12
            assert fit(engine, demo_model, module={"dtype": "bfloat16"}).global_step == 3
        finally:
            engine.really_close()

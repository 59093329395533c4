"""What a Lightning user already knows just works. docs/trainer.md names these tests, row by row."""

import math
import time

import pytest
import torch
from fakes import FakeEngine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from runs import MODEL, Gradients, RecordingEngine, data, trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from grpo_lightning import GRPOModule
from grpo_lightning.callbacks import RatioDegeneracyDetector


class Steps(Callback):
    """Notes the size of each optimizer step's gradient after clipping, and what was validated when."""

    def __init__(self):
        self.norms = []
        self.largest = []
        self.validations = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad.flatten() for p in pl_module.policy.trainable_parameters().values() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.cat(grads).norm()))
            self.largest.append(float(torch.cat(grads).abs().max()))

    def on_validation_end(self, trainer, pl_module):
        self.validations.append((trainer.global_step, trainer.sanity_checking))


def run(tmp_path, model, *, engine=None, module=None, rollout=None, callbacks=(), **settings):
    steps = Steps()
    fit = trainer(tmp_path, callbacks=[steps, *callbacks], **settings)
    policy = GRPOModule(model, **{**MODEL, **(module or {})})
    fit.fit(policy, data(engine or FakeEngine(), **{"updates_per_rollout": 2, **(rollout or {})}))
    return fit, policy, steps


def test_gradient_clip_val_by_norm_and_by_value(tmp_path, tiny_model):
    _, _, free = run(tmp_path, tiny_model)
    assert max(free.norms) > 1e-3
    _, _, norm = run(tmp_path, tiny_model, gradient_clip_val=1e-3)
    assert max(norm.norms) <= 1.001e-3
    _, _, value = run(tmp_path, tiny_model, gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    assert max(value.largest) <= 1.001e-4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precision(tmp_path, tiny_model, precision):
    """The adapter stays float32, its updates are not rounded, and the gradient is the float32 one up to bfloat16."""

    def gradients(precision):
        torch.manual_seed(0)
        collected = Gradients()
        fit, policy, _ = run(
            tmp_path, tiny_model, engine=RecordingEngine(), precision=precision, callbacks=[collected], max_epochs=1
        )
        assert fit.global_step == 2
        assert {p.dtype for p in policy.policy.trainable_parameters().values()} == {torch.float32}
        return collected.steps[0], policy

    expected, _ = gradients("32-true")
    actual, policy = gradients(precision)
    cosine = torch.nn.functional.cosine_similarity(actual, expected, dim=0)
    # bf16-true rounds the model's weights; the others compute with the same ones.
    assert float(cosine) > {"32-true": 0.999999, "bf16-mixed": 0.999, "bf16-true": 0.85}[precision]
    moved = [p for n, p in policy.policy.trainable_parameters().items() if "lora_B" in n]
    assert any(not torch.equal(p, p.bfloat16().float()) for p in moved)


def test_gradient_checkpointing(tmp_path, tiny_model, monkeypatch):
    gradients, forwards = [], []
    forward = LlamaDecoderLayer.forward

    def counted(self, *args, **kwargs):
        forwards[-1] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        forwards.append(0)
        collected = Gradients()
        run(
            tmp_path, tiny_model, module={"gradient_checkpointing": checkpointing, "kl_coef": 0.1},
            callbacks=[collected],
        )  # fmt: skip
        gradients.append(torch.stack(collected.steps))
    assert float(gradients[0].abs().max()) > 0
    assert forwards[1] > forwards[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6 * float(gradients[0].abs().max()))


def test_max_steps(tmp_path, tiny_model):
    fit, policy, _ = run(tmp_path, tiny_model, max_epochs=-1, max_steps=5)
    assert fit.global_step == policy.policy_version == 5


def test_max_time(tmp_path, tiny_model):
    begin = time.monotonic()
    fit, _, _ = run(tmp_path, tiny_model, max_epochs=-1, max_time={"seconds": 2})
    assert 2 <= time.monotonic() - begin < 30
    assert fit.global_step > 0


def test_val_check_interval(tmp_path, tiny_model):
    """Within an epoch the engine is synced for the validation, and the epoch goes on with its own rollout."""
    engine = FakeEngine()
    _, _, steps = run(
        tmp_path, tiny_model, engine=engine, rollout={"val_size": 2}, val_check_interval=0.5, num_sanity_val_steps=0
    )
    assert [step for step, _ in steps.validations] == [1, 2, 3, 4]
    sampled = [version for version, *_ in engine.calls]
    assert sampled == [0] * 12 + [1] * 2 + [2] * 14 + [3] * 2 + [4] * 2


def test_check_val_every_n_epoch(tmp_path, tiny_model):
    _, _, steps = run(
        tmp_path, tiny_model, rollout={"val_size": 2}, check_val_every_n_epoch=2, max_epochs=4, num_sanity_val_steps=0
    )
    assert [step for step, _ in steps.validations] == [4, 8]


def test_limit_batches(tmp_path, tiny_model):
    engine = FakeEngine()
    fit, _, _ = run(
        tmp_path, tiny_model, engine=engine, rollout={"val_size": 4, "val_batch_size": 1, "updates_per_rollout": 4},
        limit_train_batches=0.5, limit_val_batches=3, num_sanity_val_steps=0,
    )  # fmt: skip
    assert fit.global_step == 4
    assert sum(params.temperature == 0 for _, params, *_ in engine.requests) == 2 * 3


def test_overfit_batches(tmp_path, tiny_model):
    """The same tasks every epoch, sampled anew."""
    engine = RecordingEngine()
    prompts = []

    class Prompts(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            prompts.append([g.task.id for g in trainer.datamodule.rollout.groups])

    fit, _, _ = run(
        tmp_path, tiny_model, engine=engine, overfit_batches=2, max_epochs=3, callbacks=[Prompts()],
        rollout={"updates_per_rollout": 4},
    )  # fmt: skip
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(set(engine.seeds)) == 36
    assert fit.global_step == 6


def test_fast_dev_run(tmp_path, tiny_model):
    fit, policy, steps = run(
        tmp_path, tiny_model, fast_dev_run=True, accumulate_grad_batches=2, rollout={"val_size": 2}
    )
    assert fit.global_step == policy.policy_version == 1
    assert [step for step, _ in steps.validations] == [1]


def test_num_sanity_val_steps(tmp_path, tiny_model):
    engine = FakeEngine()
    _, _, steps = run(
        tmp_path, tiny_model, engine=engine, num_sanity_val_steps=1, max_epochs=1,
        rollout={"val_size": 4, "val_batch_size": 2},
    )  # fmt: skip
    assert steps.validations == [(0, True), (2, False)]
    assert [version for version, _ in engine.calls[:3]] == [0, 0, 0]


@pytest.mark.parametrize("monitor", ["reward/mean", "val/accuracy", "policy/entropy", "ppo/ratio_std"])
def test_early_stopping_and_model_checkpoint_on_any_metric(tmp_path, tiny_model, monitor):
    stop = EarlyStopping(monitor, mode="max", patience=1, min_delta=1e9)
    keep = ModelCheckpoint(tmp_path, "best-{epoch}", monitor=monitor, mode="max", save_top_k=1)
    fit, _, _ = run(
        tmp_path, tiny_model, callbacks=[stop, keep], enable_checkpointing=True, max_epochs=9,
        rollout={"val_size": 2}, num_sanity_val_steps=0,
    )  # fmt: skip
    assert fit.current_epoch == 2
    assert keep.best_model_score is not None
    assert math.isfinite(float(keep.best_model_score))
    assert (tmp_path / keep.best_model_path).exists()


def test_lr_schedulers_and_learning_rate_monitor(tmp_path, tiny_model):
    monitor = LearningRateMonitor("step")
    fit, _, _ = run(
        tmp_path, tiny_model, callbacks=[monitor], logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1, module={"lr_schedule": "linear"},
    )  # fmt: skip
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("lr-AdamW")
    rates = [float(value) for row in rows[1:] if (value := row.split(",")[column])]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert fit.global_step == 4


def test_own_optimizer_and_a_scheduler_on_a_metric(tmp_path, tiny_model):
    class Own(GRPOModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.policy.trainable_parameters().values(), lr=0.1)
            scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "reward/mean"}}

    fit = trainer(tmp_path, max_epochs=3, callbacks=[RatioDegeneracyDetector(max_mismatch=100)])
    fit.fit(Own(tiny_model, **MODEL), data(FakeEngine()))
    assert fit.optimizers[0].param_groups[0]["lr"] < 0.1


def test_profiler(tmp_path, tiny_model):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    run(tmp_path, tiny_model, profiler=profiler, max_epochs=1)
    text = next(tmp_path.glob("*profile*")).read_text()
    assert "run_training_batch" in text
    assert "RolloutDataModule.train_dataloader" in text

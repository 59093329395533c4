"""Resuming with vLLM, whose sampling depends on what else is in the batch: all that does not is equal bit for bit."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from real import SharedVLLMEngine, fit, make_trainer

from grpo_lightning.callbacks import RatioDegeneracyDetector

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class RecordingEngine(SharedVLLMEngine):
    """Notes the seed and the prompt of each sampled request, and the names of adapters."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.requests = []
        self.adapters = []

    async def generate(self, prompt_ids, params, *, seed=None, **settings):
        self.requests.append((tuple(prompt_ids), seed))
        return await super().generate(prompt_ids, params, seed=seed, **settings)

    def load_adapter(self, ref):
        self.adapters.append((ref.name, ref.id, ref.path))
        super().load_adapter(ref)

    def taken(self):
        requests, self.requests = sorted(self.requests), []
        return requests


class Notes(Callback):
    def __init__(self):
        self.batches = []
        self.optimizer = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((float(outputs["loss"]), batch.target_ids.tolist(), batch.policy_version.tolist()))
        state = trainer.optimizers[0].state_dict()["state"]
        self.optimizer[trainer.global_step] = {k: v["exp_avg_sq"].clone() for k, v in state.items()}


def test_resume(tmp_path, demo_model):
    engine = RecordingEngine(dtype="float32")
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)

    def run(callbacks, **settings):
        notes = Notes()
        # The whole doctor would ask the engine questions of its own.
        trainer = make_trainer(
            max_epochs=2,
            accumulate_grad_batches=2,
            callbacks=[notes, RatioDegeneracyDetector(), *callbacks],
            enable_checkpointing=bool(callbacks),
        )
        fit(engine, demo_model, trainer=trainer, updates_per_rollout=2, **settings)
        return notes, engine.taken(), trainer.lightning_module.policy_version

    try:
        whole, asked, version = run([keep])
        resumed, asked_again, version_again = run([], ckpt_path=tmp_path / "step=1.ckpt")
    finally:
        engine.really_close()
    # The rest of the epoch is trained on the stored rollout.
    assert resumed.batches[:2] == whole.batches[2:4]
    for number, moment in whole.optimizer[2].items():
        assert torch.equal(resumed.optimizer[2][number], moment)
    # The next rollout asks for the same: its tasks and seeds, once.
    assert len(asked_again) == 16
    assert set(asked_again) < set(asked)
    assert len(set(asked)) == 32
    assert version_again == version == 4
    for values in zip(*engine.adapters, strict=True):
        assert len(set(values)) == len(engine.adapters) == 3

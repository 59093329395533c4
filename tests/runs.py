"""Short runs of a tiny model, for tests of what happens around them."""

import torch
from lightning.pytorch import Callback, Trainer

from grpo_lightning import RolloutDataModule, TransformersEngine
from grpo_lightning.callbacks import RatioDegeneracyDetector, RunDoctor
from grpo_lightning.tasks import SumTasks

MODEL = {"dtype": "float32", "lora_rank": 4, "learning_rate": 1e-3}


class RecordingEngine(TransformersEngine):
    """A real engine that notes the seeds of its sampled requests."""

    def __init__(self):
        super().__init__(dtype="float32")
        self.seeds = []

    async def generate(self, prompt_ids, params, *, seed=None, **settings):
        if params.temperature > 0:
            self.seeds.append(seed)
        return await super().generate(prompt_ids, params, seed=seed, **settings)


def length(completion):
    return float(len(completion))


def trainer(tmp_path, **settings):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    callbacks = settings.pop("callbacks", [])
    if not any(isinstance(c, RunDoctor) for c in callbacks):
        # The fake engine's logprobs are random numbers.
        callbacks = [*callbacks, RatioDegeneracyDetector(max_mismatch=100)]
    return Trainer(callbacks=callbacks, **{**defaults, **settings})


def data(engine, reward=length, **settings):
    defaults = {"prompts_per_rollout": 4, "samples_per_prompt": 3, "max_tokens": 6, "max_prompt_tokens": 64}
    settings = {**defaults, "rewards": reward, **settings}
    return RolloutDataModule(SumTasks(5), engine=engine, **settings)


class Gradients(Callback):
    """Collects the gradient of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad.flatten() for p in pl_module.policy.trainable_parameters().values() if p.grad is not None]
        self.steps.append(torch.cat(grads).clone())

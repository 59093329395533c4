"""Random adapters and policies, for the tests of where a policy starts."""

import json
from pathlib import Path

import torch
from fakes import make_row
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import data, trainer

from grpo_lightning import GRPOModule
from grpo_lightning.adapters import save_adapter
from grpo_lightning.callbacks import RatioDegeneracyDetector
from grpo_lightning.loading import load_policy
from grpo_lightning.rollout.packing import pack


def relaxed():
    """A detector for the fake engine, whose logprobs are random numbers."""
    return RatioDegeneracyDetector(max_mismatch=100)


def fit(tmp_path, module, engine, *, epochs=1, ckpt_path=None, callbacks=(), **settings):
    """Train under the detector's own limits and leave ``last.ckpt`` in ``tmp_path``; returns the trainer."""
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    detector = [] if any(isinstance(c, RatioDegeneracyDetector) for c in callbacks) else [RatioDegeneracyDetector()]
    run = trainer(
        tmp_path, max_epochs=epochs, enable_checkpointing=True, callbacks=[*callbacks, *detector, keep], **settings
    )
    run.fit(module, data(engine, max_tokens=12), ckpt_path=ckpt_path)
    return run


def module(model, **settings):
    return GRPOModule(model, **{"dtype": "float32", "learning_rate": 1e-3, **settings})


def randomise(policy, scale=0.1, seed=1):
    """Other values for everything that is trained."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * scale)


def make_adapter(model, directory, *, config=None, seed=1, **settings) -> Path:
    """A random adapter in PEFT's format; ``config`` changes its adapter_config.json."""
    policy = load_policy(model, **{"dtype": "float32", "lora_rank": 5, "lora_alpha": 12.0, **settings})
    randomise(policy, seed=seed)
    save_adapter(policy, directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return directory


def batch(vocabulary=90):
    """A packed batch of three rows."""
    random = torch.Generator().manual_seed(0)

    def ids(count):
        return tuple(torch.randint(3, vocabulary, (count,), generator=random).tolist())

    return pack([make_row(ids(5), [ids(n) for n in lengths]) for lengths in ((3, 6), (9,), (2, 4, 7))], 0.9)


def logprobs(policy):
    """Log-probabilities of `batch`, without gradient."""
    with torch.no_grad():
        return policy.token_logprobs(batch())[0]

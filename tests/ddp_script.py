"""A short run in one or more processes; saves what it computed. Run by test_distributed.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning import GRPOModule, RolloutDataModule, TransformersEngine, VLLMEngine, compiled
from grpo_lightning.callbacks import AdapterExport, CompletionLog, RunSummary, TrajectoryStore
from grpo_lightning.errors import GRPOError
from grpo_lightning.tasks import SumTasks


class Record(Callback):
    """Gradients of every optimizer step, losses and metrics."""

    def __init__(self):
        self.gradients = []
        self.ratios = []
        self.evidence = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad.flatten() for p in pl_module.policy.trainable_parameters().values()]
        self.gradients.append(torch.cat(grads).clone())
        evidence = pl_module.current_update().evidence
        self.ratios.append(pl_module.current_update().ratio)
        order = evidence.ledger_index.argsort()
        rows = {name: getattr(evidence, name)[order] for name in ("ledger_index", "marked", "factor", "advantage")}
        self.evidence.append(rows | {"kl_coef": pl_module._coefficients.kl})


class Diverge(Callback):
    """Each process adds a number of its own to one weight during the first step."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            next(iter(pl_module.policy.trainable_parameters().values())).data.add_(1e-6 * trainer.global_rank)


def length(completion):
    return float(len(completion) + completion.count("a"))


def broken(completion):
    raise ZeroDivisionError("oops")


def uneven(completion, task_id):
    return None if int(task_id.split("+")[0]) < 3 else float(len(completion))


def flat(completion, task_id):
    return 1.0 if int(task_id.split("+")[0]) < 3 else float(len(set(completion)))


ENGINES = {"transformers": TransformersEngine, "vllm": VLLMEngine}
REWARDS = {"length": length, "broken": broken, "uneven": uneven, "flat": flat}


def main() -> None:
    model, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    seed_everything(7)
    compiled.FEWEST_TOKENS = settings.get("fewest_tokens", compiled.FEWEST_TOKENS)
    record = Record()
    if settings.get("fault") == "recompute":
        import grpo_lightning.module

        right = grpo_lightning.module.policy_loss
        grpo_lightning.module.policy_loss = lambda objective, inputs: right(
            objective, replace(inputs, old_logprobs=inputs.logprobs.detach())
        )
    trainer = Trainer(
        accelerator="cpu",
        devices=settings["devices"],
        strategy="ddp" if settings["devices"] > 1 else "auto",
        max_epochs=settings.get("max_epochs", 2),
        accumulate_grad_batches=settings.get("accumulate", 2),
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        gradient_clip_val=settings.get("clip"),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            record,
            ModelCheckpoint(folder / "ckpt", "{step}", every_n_train_steps=1, save_top_k=-1),
            EarlyStopping("reward/mean", mode="max", patience=5),
            AdapterExport(),
            CompletionLog(),
            RunSummary(plot=False),
            TrajectoryStore(),
            *([Diverge()] if settings.get("fault") == "diverge" else []),
        ],
    )
    own = {"learning_rate": 1e-3, "kl_coef": 0.05, "aggregation": settings["aggregation"]}
    module = GRPOModule(model, dtype="float32", lora_rank=4, **{**own, **settings.get("module", {})})
    data = RolloutDataModule(
        SumTasks(5),
        REWARDS[settings.get("reward", "length")],
        engine=ENGINES[settings.get("engine", "transformers")](dtype="float32"),
        val_size=4,
        prompts_per_rollout=6,
        samples_per_prompt=3,
        max_tokens=6,
        max_prompt_tokens=64,
        **{"updates_per_rollout": 2, **settings.get("rollout", {})},
    )
    try:
        trainer.fit(module, data, ckpt_path=settings.get("ckpt_path"))
    except GRPOError as error:
        print(f"rank {trainer.global_rank}: {type(error).__name__}: {error}", flush=True)
        sys.exit(3)
    torch.save(
        {
            "gradients": torch.stack(record.gradients),
            "ratios": record.ratios,
            "evidence": record.evidence,
            "weights": {n: p.detach() for n, p in module.policy.trainable_parameters().items()},
            "metrics": {n: float(v) for n, v in trainer.callback_metrics.items()},
            "version": module.policy_version,
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()

"""Computing an update's log-probabilities again, at other weights or in another mode."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from grpo_lightning.compiled import as_in_training
from grpo_lightning.diagnostics.examination import Run
from grpo_lightning.distributed import processes
from grpo_lightning.policy import evaluating
from grpo_lightning.rollout.batch import PackedBatch


def logprobs_now(run: Run, batches: Sequence[PackedBatch]) -> Tensor:
    """Logprobs of the trained tokens of all micro-batches of all processes, without dropout.

    All processes must call it.

    Args:
        run: The run.
        batches: This process's micro-batches.

    Returns:
        Float64 ``[N]``, in the evidence's order.
    """
    with _computing(run, training=False):
        mine = torch.cat([_logprobs(run, batch) for batch in batches])
    return torch.cat(processes().gather(mine))


def difference_of_two(run: Run, batch: PackedBatch, *, training: bool) -> float:
    """RMS of the difference of two forwards with the same weights, in nats, the largest of all processes.

    Args:
        run: The run.
        batch: This process's micro-batch.
        training: Compute in the mode that training uses; else without dropout.
    """
    with _computing(run, training=training):
        one, other = (_logprobs(run, batch) for _ in range(2))
    return max(processes().gather(float((one - other).square().mean().sqrt()) if len(one) else 0.0))


def between(before: Mapping[str, Tensor], now: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The parameters after a share of the step."""
    return {
        name: (before[name] + share * (p.detach() - before[name])).to(p.dtype) if name in before else p.detach()
        for name, p in now.items()
    }


def _logprobs(run: Run, batch: PackedBatch) -> Tensor:
    """As in the evidence, without the reference's."""
    logprobs = run.module.policy.token_logprobs(batch).logprobs
    return logprobs[batch.loss_weight > 0].cpu().double()


@contextlib.contextmanager
def _computing(run: Run, *, training: bool) -> Iterator[None]:
    """Compute as training does, without gradient and without using up its random numbers."""
    devices = [run.module.device] if run.module.device.type == "cuda" else []
    mode = contextlib.nullcontext() if training else evaluating(run.module)
    precision = run.trainer.precision_plugin.train_step_context()
    with mode, torch.no_grad(), as_in_training(), precision, torch.random.fork_rng(devices):
        yield

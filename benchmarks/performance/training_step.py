"""A training step of the demo's model in a process of its own, by this project or as it is plainly written.

Run: python -m benchmarks.performance.training_step packed '{"prompts": 2, "samples": 4, ...}' REPEATS
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.performance.batches import Shape, made_batch
from benchmarks.performance.growth_step import WARM, restarted_peak, run_module, status

PACKED, PADDED, GIVEN_BACK = "packed", "padded", "packed, freed memory given back"
SIDES = (PACKED, PADDED)
"""What section ``training`` compares."""


def step_point(side: str, shape: Shape, repeats: int) -> dict[str, float]:
    """Measure a step in a fresh process.

    Args:
        side: One of `STEPS`.
        shape: The batch.
        repeats: Steps; the fastest counts.

    Returns:
        What `measured` returns.
    """
    return run_module("benchmarks.performance.training_step", side, json.dumps(asdict(shape)), str(repeats))


def packed(*, keeps_memory: bool = True) -> Any:
    """The step of a compiled `GRPOModule`: prompts shared, logits in chunks.

    Args:
        keeps_memory: Whether with the memory settings of its `setup`.
    """
    from grpo_lightning import GRPOModule
    from grpo_lightning.demo import prepare_model
    from grpo_lightning.freed_memory import keep_freed_memory

    if keeps_memory:
        keep_freed_memory()
    module: Any = GRPOModule(str(prepare_model()), dtype="bfloat16", torch_compile=True)
    module.configure_model()

    def step(shape: Shape) -> None:
        loss, _ = module.batch_loss(made_batch(shape))
        loss.backward()
        module.zero_grad(set_to_none=False)

    return step


def padded() -> Any:
    """PEFT and transformers as they come: a row a sample, its prompt in it, all logits in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from grpo_lightning.demo import prepare_model
    from grpo_lightning.policy import unpack

    base: Any = AutoModelForCausalLM.from_pretrained(str(prepare_model()), dtype=torch.bfloat16)
    model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    def step(shape: Shape) -> None:
        batch = made_batch(shape)
        ids, lengths, row, position = unpack(batch)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        new = logprobs[row, position, batch.target_ids]
        ratio = (new - batch.old_logprobs).exp()
        clipped = ratio.clamp(0.8, 1.2) * batch.advantages
        loss = -(torch.minimum(ratio * batch.advantages, clipped) * batch.loss_weight).sum()
        loss.backward()
        model.zero_grad(set_to_none=False)

    return step


STEPS: dict[str, Callable[[], Any]] = {
    PACKED: packed,
    PADDED: padded,
    GIVEN_BACK: partial(packed, keeps_memory=False),
}
"""What can be measured."""


def measured(side: str, shape: Shape, repeats: int) -> dict[str, float]:
    """Forward and backward pass of one batch, in bfloat16.

    Args:
        side: One of `STEPS`.
        shape: The batch.
        repeats: Steps.

    Returns:
        ``seconds`` of the fastest, wall clock, and ``first_seconds`` of the first, which may wait for the compiler.
        ``bytes``: the largest resident memory during the steps, above what was resident before the first: weights,
        gradients and libraries are there by then.
    """
    step = STEPS[side]()
    step(WARM)
    before, found = restarted_peak(), []
    for _ in range(repeats):
        begin = time.perf_counter()
        step(shape)
        found.append(time.perf_counter() - begin)
    return {"seconds": min(found), "first_seconds": found[0], "bytes": status("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], Shape(**json.loads(sys.argv[2])), int(sys.argv[3]))))

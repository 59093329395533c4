"""Training steps of the demo model; prints the peak of this process's memory beyond what it had before the model.

Arguments: dtype, prompts, samples, prompt tokens, completion tokens, gradient checkpointing (0 or 1).
"""

import sys
from pathlib import Path

import lightning.pytorch
import peft
import torch
import transformers
from fakes import make_row

from grpo_lightning.demo import prepare_model
from grpo_lightning.loading import load_policy
from grpo_lightning.rollout.packing import pack


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(dtype, prompts, samples, prompt_tokens, completion_tokens, checkpointing):
    assert all((lightning.pytorch, peft, transformers.AutoModelForCausalLM))
    before = status("VmRSS")
    policy = load_policy(str(prepare_model()), dtype=dtype, gradient_checkpointing=bool(checkpointing))
    optimizer = torch.optim.AdamW(list(policy.trainable_parameters().values()))
    random = torch.Generator().manual_seed(0)

    def ids(count):
        return tuple(torch.randint(49000, (count,), generator=random).tolist())

    rows = [make_row(ids(prompt_tokens), [ids(completion_tokens) for _ in range(samples)]) for _ in range(prompts)]
    batch = pack(rows, 1.0)
    for _ in range(2):
        logprobs, *_ = policy.token_logprobs(batch)
        logprobs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    print("peak", status("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

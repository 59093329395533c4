"""TRL's gradients of given tokens. Runs in TRL's environment.

Run: python -m benchmarks.performance.trl.their_gradients SPEC.json
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.performance.trl.theirs import trainer_of
from benchmarks.performance.turns import spec
from grpo_lightning.adapters import read_adapter_weights


def gradient(asked: Mapping[str, Any], dtype: str) -> dict[str, Tensor]:
    """The adapter's gradient by TRL's own loss, over micro-batches as its settings cut them.

    Args:
        asked: The tokens, their old log-probabilities and advantages, the adapter and the settings.
        dtype: Of the base model.
    """
    settings = {**asked["settings"], "dtype": dtype, "autocast": False}
    with TemporaryDirectory() as folder:
        trainer = trainer_of({**asked, "settings": settings}, folder)
    model: Any = trainer.model
    set_peft_model_state_dict(model, read_adapter_weights(Path(asked["adapter"])))
    model.train()
    completions = [ids for group in asked["completions"] for ids in group]
    prompts = [ids for ids, group in zip(asked["prompts"], asked["completions"], strict=True) for _ in group]
    steps = len(completions) // settings["batch"]
    trainer.current_gradient_accumulation_steps = steps
    for number in range(steps):
        part = slice(number * settings["batch"], (number + 1) * settings["batch"])
        loss = trainer.compute_loss(model, inputs_of(asked, prompts[part], completions[part], part, trainer))
        loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}


def inputs_of(
    asked: Mapping[str, Any], prompts: list[list[int]], completions: list[list[int]], part: slice, trainer: Any
) -> dict[str, Tensor]:
    """A micro-batch as TRL's rollout leaves it: prompts padded on the left."""
    width, padding = max(map(len, prompts)), trainer._tokenizer.pad_token_id
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    answers = torch.tensor(completions)
    return {
        "prompt_ids": torch.tensor([[padding] * (width - len(ids)) + ids for ids in prompts]),
        "prompt_mask": mask,
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "advantages": torch.tensor(asked["advantages"][part]),
        "old_per_token_logps": torch.tensor(asked["old_logprobs"][part]),
        "num_items_in_batch": torch.tensor(answers.numel()),
    }


def main() -> None:
    """Write a file of gradients for each dtype."""
    asked = spec()
    for dtype in asked["dtypes"]:
        save_file(gradient(asked, dtype), Path(asked["gradients"]) / f"{dtype}.safetensors")


if __name__ == "__main__":
    main()

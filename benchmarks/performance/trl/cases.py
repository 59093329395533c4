"""What both sides train on."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_lightning.adapter_config import DEFAULT_ALPHA, DEFAULT_RANK
from grpo_lightning.rewards import last_number_correct
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import SumTasks

MAX_NUMBER = 20
"""Largest summand of the short task."""

ADAPTER = {
    "r": DEFAULT_RANK,
    "lora_alpha": DEFAULT_ALPHA,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
"""The adapter as PEFT's ``LoraConfig`` takes it."""

Encode = Callable[[Sequence[Mapping[str, Any]]], list[int]]
"""The tokens of a conversation, by the model's chat template."""


def characters(completion: str) -> float:
    """A reward that differs within almost every group: hundreds of characters."""
    return len(completion) / 100


REWARDS: dict[str, Callable[..., float]] = {"correct": last_number_correct, "characters": characters}


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison.

    Attributes:
        name: What it is called.
        prompts: Prompts of an update.
        samples: Completions of each.
        tokens: Tokens of each completion.
        prompt_tokens: Exact length of the prompts; 0 leaves them as they come.
        reward: Name of the reward.
        exact: Whether every completion has exactly ``tokens`` tokens; else the policy may end it.
        learning_rate: Of both sides.
    """

    name: str
    prompts: int
    samples: int
    tokens: int
    prompt_tokens: int = 0
    reward: str = "correct"
    exact: bool = True
    learning_rate: float = 1e-4

    @property
    def completions(self) -> int:
        """Completions of an update."""
        return self.prompts * self.samples


SHORT = Case("short", 8, 8, 48)
LONG = Case("long", 2, 8, 64, prompt_tokens=1000, reward="characters")
LEARNING = Case("learning", 16, 8, 20, exact=False, learning_rate=2e-4)


def smoke(case: Case) -> Case:
    """The case as small as it gets."""
    return replace(case, prompts=2, samples=2, tokens=4, prompt_tokens=min(case.prompt_tokens, 120))


def tasks(case: Case, updates: int, encode: Encode) -> list[Task]:
    """The tasks of all updates in order, the same at every call.

    Args:
        case: Their sizes.
        updates: How many updates they must last for.
        encode: The model's encoder.

    Raises:
        ValueError: If there are not enough, or the prompts do not get the length that they must have.
    """
    count = updates * case.prompts
    if case.prompt_tokens:
        return [_long(number, case.prompt_tokens, encode) for number in range(count)]
    source = SumTasks(MAX_NUMBER)
    if count > len(source):
        raise ValueError(f"expected at most {len(source)} tasks, but {updates} updates need {count}")
    return [source[index] for index in random.Random(0).sample(range(len(source)), count)]


def _long(number: int, length: int, encode: Encode) -> Task:
    """A list of sums, then a question. The lists differ from their first line on: no two tasks share more."""
    draw = random.Random(number)
    lines: list[str] = []
    pairs = [(draw.randint(10, 99), draw.randint(10, 99))]

    def messages(words: int) -> tuple[dict[str, Any], ...]:
        a, b = pairs[-1]
        text = "\n".join([*lines, "And" + " so" * words + f": what is {a} + {b}?"])
        return ({"role": "user", "content": text},)

    while len(encode(messages(0))) <= length:
        a, b = pairs[-1]
        lines.append(f"{a} + {b} = {a + b}.")
        pairs.append((draw.randint(10, 99), draw.randint(10, 99)))
    if not lines:
        raise ValueError(f"expected prompts of at least {len(encode(messages(0)))} tokens, but {length} are asked for")
    lines.pop()
    found = messages(length - len(encode(messages(0))))
    if len(encode(found)) != length:
        raise ValueError(f"expected a prompt of {length} tokens, but it has {len(encode(found))}")
    a, b = pairs[-1]
    return Task(id=f"long-{number}", messages=found, data={"answer": str(a + b)})


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Names the tokens of prompts, so that both sides can be held to the same."""
    return hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()[:16]

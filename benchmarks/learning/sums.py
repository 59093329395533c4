"""The task: sums of two numbers below 100, as plain text, one token a character."""

import random
from pathlib import Path

from grpo_lightning.rollout.types import Task

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = (PAD, EOS, UNKNOWN, *"0123456789+=")
IDS = {token: number for number, token in enumerate(VOCABULARY)}
NUMBERS = 100
MAX_TOKENS = 5
"""Longest answer: three digits and the end, and one more for what goes wrong."""

Sum = tuple[int, int]


def split(held_out: int, seed: int) -> tuple[list[Sum], list[Sum]]:
    """All sums, to train on and held out.

    Args:
        held_out: How many to hold out.
        seed: Which.
    """
    sums = [(a, b) for a in range(NUMBERS) for b in range(NUMBERS)]
    random.Random(f"sums {seed}").shuffle(sums)
    return sums[held_out:], sums[:held_out]


def prompt(pair: Sum) -> str:
    """What the model is asked."""
    return f"{pair[0]}+{pair[1]}="


def answer(pair: Sum) -> str:
    """What it should say."""
    return str(pair[0] + pair[1])


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return [IDS[character] for character in text]


def right(completion: str, answer: str) -> float:
    """The reward: 1 for the right answer and nothing else."""
    return float(completion == answer)


class Sums:
    """Tasks from sums.

    Args:
        sums: The sums.
    """

    def __init__(self, sums: list[Sum]) -> None:
        self._sums = sums

    def __len__(self) -> int:
        return len(self._sums)

    def __getitem__(self, index: int) -> Task:
        pair = self._sums[index]
        return Task(
            id=prompt(pair),
            messages=({"role": "user", "content": prompt(pair)},),
            data={"answer": answer(pair)},
        )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer beside a model.

    Args:
        folder: Where to.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel(IDS, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
    tokenizer.save_pretrained(folder)

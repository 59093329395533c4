"""The tensors that both sides are given: two prompts with four answers each.

Run: python -m benchmarks.trl_losses.batch      make them anew

Shapes: ``S`` answers, ``N`` sampled tokens, flat over the answers, ``K`` single rewards.
"""

import json
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

STORED = Path(__file__).parent / "batch.json"
LENGTHS = (3, 7, 5, 1, 6, 4, 8, 2)
SAMPLES = 4
"""Answers to each prompt."""


@dataclass(frozen=True)
class Batch:
    """What is compared on.

    Attributes:
        lengths: Sampled tokens of each answer.
        logprobs: Of the policy that is trained, ``[N]``.
        old: Of the policy before the first update, by the trainer, ``[N]``.
        sampling: The same by the engine, ``[N]``.
        reference: Of the reference, ``[N]``.
        entropy: Of the policy that is trained, ``[N]``.
        acted: 0 where a tool wrote the token, in the comparisons that have tools, ``[N]``.
        truncated: Answers that the limit cut off, in the comparisons that leave such out.
        rewards: Single rewards, ``[S][K]``.
        reward_weights: Their weights, ``[K]``.
    """

    lengths: tuple[int, ...]
    logprobs: tuple[float, ...]
    old: tuple[float, ...]
    sampling: tuple[float, ...]
    reference: tuple[float, ...]
    entropy: tuple[float, ...]
    acted: tuple[int, ...]
    truncated: tuple[int, ...]
    rewards: tuple[tuple[float, ...], ...]
    reward_weights: tuple[float, ...]

    @classmethod
    def stored(cls) -> "Batch":
        """The one that the results are of."""
        return cls(**json.loads(STORED.read_text("utf-8")))

    def spans(self) -> list[tuple[int, int]]:
        """First token of each answer, and the one behind its last."""
        return list(pairwise(accumulate(self.lengths, initial=0)))


def made(seed: int = 33) -> Batch:
    """A batch of random numbers, on which every bound that is compared binds for some tokens and not for others.

    Args:
        seed: Of the numbers; with others some bounds may not bind, which the tests would show.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(centre: Tensor, spread: float) -> Tensor:
        noise = spread * torch.randn(len(centre), dtype=torch.float64, generator=generator)
        return (centre + noise).clamp(max=-0.01)

    count = sum(LENGTHS)
    old = -2 * torch.rand(count, dtype=torch.float64, generator=generator) - 0.1
    sampling = near(old, 0.25)
    # The engine found these answers likelier than the trainer does. Their rewards are the lowest of their groups.
    for answer in (1, 7):
        begin, end = sum(LENGTHS[:answer]), sum(LENGTHS[: answer + 1])
        sampling[begin:end] = (old[begin:end] + 0.4).clamp(max=-0.01)
    acted = [int(place % 5 != 3) for place in range(count)]
    # Multiples of powers of 1/2 are the same in single precision, in which TRL compares entropies and takes rewards.
    entropy = torch.randint(1, 2048, (count,), generator=generator).double() / 1024
    return Batch(
        lengths=LENGTHS,
        logprobs=_rounded(near(old, 0.3)),
        old=_rounded(old),
        sampling=_rounded(sampling),
        reference=_rounded(near(old, 0.3)),
        entropy=tuple(entropy.tolist()),
        acted=tuple(acted),
        truncated=(2, 6),
        rewards=((1.0, 0.5), (0.0, 0.25), (0.5, 2.0), (1.0, 0.0), (0.25, 1.0), (1.0, 1.5), (0.5, 0.75), (0.0, 0.5)),
        reward_weights=(1.0, 0.5),
    )


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())


if __name__ == "__main__":
    STORED.write_text(json.dumps(asdict(made())).replace('], "', '],\n"') + "\n", encoding="utf-8")

"""A toy language model of 300 tokens, sampled in right and wrong ways."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.diagnostics.tally import Tally, tally

VOCABULARY = 300


@dataclass(frozen=True)
class Toy:
    """Tokens with what trainer and sampler say of them.

    Attributes:
        logp: The trainer's distributions ``[N, V]``.
        tokens: The sampled tokens ``[N]``.
        o: The trainer's logprobs ``[N]``.
        s: The sampler's ``[N]``.
        generator: Goes on where the draw ended.
    """

    logp: Tensor
    tokens: Tensor
    o: Tensor
    s: Tensor
    generator: torch.Generator

    @property
    def sequence(self) -> Tensor:
        """Sequences of 16 tokens."""
        return torch.arange(len(self.o)) // 16

    def tally(self) -> Tally:
        p = self.logp.exp()
        entropy = -(p * self.logp).sum(-1)
        variance = (p * (self.logp + entropy[:, None]).square()).sum(-1)
        above = (p * (self.logp > self.o[:, None])).sum(-1)
        return tally(self.o, entropy, variance, above, self.s, self.generator)


def picked(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None]).squeeze(1)


def right(logits, temperature, _):
    return (logits / temperature).log_softmax(-1)


def at_temperature(other):
    return lambda logits, temperature, _: (logits / other).log_softmax(-1)


def top_p(mass):
    def distribution(logits, temperature, _):
        logp = (logits / temperature).log_softmax(-1)
        probs, order = logp.exp().sort(-1, descending=True)
        cut = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, probs.cumsum(-1) - probs >= mass)
        return logp.masked_fill(cut, -math.inf).log_softmax(-1)

    return distribution


def top_k(count):
    def distribution(logits, temperature, _):
        logp = (logits / temperature).log_softmax(-1)
        return logp.masked_fill(logp < logp.topk(count)[0][:, -1:], -math.inf).log_softmax(-1)

    return distribution


def min_p(share):
    def distribution(logits, temperature, _):
        logp = (logits / temperature).log_softmax(-1)
        least = logp.max(-1, keepdim=True)[0] + math.log(share)
        return logp.masked_fill(logp < least, -math.inf).log_softmax(-1)

    return distribution


def draw(
    seed, count, distribution=right, *, temperature=1.0, noise=0.0, trainer_noise=0.0, foreign=0.0, sharpness=1.0
) -> Toy:
    """Sample tokens.

    Args:
        seed: Seed.
        count: Tokens.
        distribution: ``(logits, temperature, generator) -> log-probabilities`` that the sampler draws from.
        temperature: What the trainer believes.
        noise: Standard deviation of the sampler's noise in each logit, nats.
        trainer_noise: The trainer's.
        foreign: Part of the tokens that are drawn from nothing.
        sharpness: Factor of all logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(columns=VOCABULARY):
        return torch.randn(count, columns, generator=generator, dtype=torch.float64)

    width = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 3 + 1
    logits = normal() * width * sharpness
    theirs = distribution(logits + noise * normal(), temperature, generator)
    logp = ((logits + trainer_noise * normal()) / temperature).log_softmax(-1)
    tokens = torch.multinomial(theirs.exp(), 1, generator=generator).squeeze(1)
    replaced = torch.rand(count, generator=generator) < foreign
    tokens = torch.where(replaced, torch.randint(VOCABULARY, (count,), generator=generator), tokens)
    return Toy(logp, tokens, picked(logp, tokens), picked(theirs, tokens), generator)

"""Floating-point operations that training and sampling cannot do without."""

from dataclasses import dataclass
from typing import Any

from benchmarks.performance.batches import Shape


@dataclass(frozen=True)
class Dimensions:
    """What the useful operations of a model depend on.

    Attributes:
        linear: Weights that every token is multiplied with, in all layers.
        head: Weights of the output head.
        attention: Query heads times their size, summed over layers.
    """

    linear: int
    head: int
    attention: int

    @classmethod
    def of(cls, config: Any) -> "Dimensions":
        """Of a Llama-like model with three matrices in each layer's feed-forward part.

        Args:
            config: The model's configuration.
        """
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        own = 2 * config.hidden_size * size * (config.num_attention_heads + config.num_key_value_heads)
        layer = own + 3 * config.hidden_size * config.intermediate_size
        layers = config.num_hidden_layers
        return cls(layers * layer, config.vocab_size * config.hidden_size, layers * config.num_attention_heads * size)

    def operations(self, shape: Shape, *, training: bool) -> float:
        """The operations of a rollout; adapter, norms and activations count as nothing.

            forward  = 2 linear T + 2 head N + 4 attention (pairs of a token and one that it sees)
            training = 4 linear T + 4 head N + 12 attention pairs        (frozen weights have no gradient)

        ``T`` tokens go through the layers, each shared prompt once, and of each episode all but its last; ``N`` tokens
        are sampled. The pairs grow with the square of a sequence's length: attention's own quadratic part.

        Args:
            shape: The rollout.
            training: Forward and backward pass; else the forward pass alone, as in sampling with all earlier tokens
                cached.
        """
        prompt, own = shape.prompt_tokens, shape.episode_tokens - 1
        pairs = prompt * (prompt + 1) / 2 + shape.samples * (own * prompt + own * (own + 1) / 2)
        linear = self.linear * shape.input_tokens + self.head * shape.sampled_tokens
        return (4 if training else 2) * linear + (12 if training else 4) * self.attention * shape.prompts * pairs

"""Useful operations, worked by hand."""

from transformers import LlamaConfig

from benchmarks.performance.batches import Shape
from benchmarks.performance.operations import Dimensions

MODEL = LlamaConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
)


def test_of_a_model():
    # A layer has 8*8 (q), 2 * 8*4 (k, v), 8*8 (o) and 3 * 8*16 weights; 3 + 2 * 1 input tokens, 4 sampled.
    layers = 2 * (64 + 64 + 64 + 384)
    pairs = 6 + 2 * (3 + 1)
    expected = 2 * (2 * 5 * layers + 2 * 4 * 32 * 8) + 3 * 4 * 4 * 2 * 2 * pairs
    assert Dimensions.of(MODEL).operations(Shape(1, 2, 3, 2), training=True) == expected


def test_training_has_two_passes_of_products_and_three_of_attention():
    dims = Dimensions(linear=100, head=10, attention=3)
    shape = Shape(prompts=2, samples=2, prompt_tokens=4, completion_tokens=3)
    # 16 tokens through the layers, 12 sampled; a prompt sees 10, the inputs of a completion 8 of it and 3 of their own.
    assert shape.input_tokens == 16
    assert dims.operations(shape, training=False) == 2 * (1600 + 120) + 4 * 3 * 2 * (10 + 2 * 11)
    assert dims.operations(shape, training=True) == 4 * (1600 + 120) + 12 * 3 * 2 * (10 + 2 * 11)

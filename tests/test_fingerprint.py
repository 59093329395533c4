import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_lightning.fingerprint import base_fingerprint
from grpo_lightning.loading import load_policy


def model(vocabulary=320):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("vocabulary", [320, 32000])
def test_the_same_in_every_precision_and_under_every_default(vocabulary):
    expected = base_fingerprint(model(vocabulary))
    assert base_fingerprint(model(vocabulary).bfloat16()) == expected
    loaded = model(vocabulary)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert base_fingerprint(loaded) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_same_under_an_adapter(tiny_model):
    bare = load_policy(tiny_model, dtype="float32", full_finetuning=True)
    adapted = load_policy(tiny_model, dtype="float32", lora_rank=4)
    assert base_fingerprint(adapted.causal_lm) == base_fingerprint(bare.causal_lm)


@pytest.mark.parametrize("layer", ["model.embed_tokens", "model.layers.1.mlp.up_proj", "lm_head", "model.norm"])
def test_any_layer_counts(layer):
    other = model()
    with torch.no_grad():
        other.get_submodule(layer).weight.mul_(1.5)
    assert base_fingerprint(other) != base_fingerprint(model())

"""What the flash kernels get of a packed batch: transformers' own path to them, with a slow kernel in their place."""

import itertools

import pytest
import torch
from test_policy import FAMILIES, LENGTHS, float64_throughout, gradients, make_rows, save, tiny_policy
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash

from grpo_lightning.policy import choose_layout
from grpo_lightning.rollout.packing import pack


class Kernels:
    """Reference kernels in the calling convention of flash attention, which note what they were given."""

    def __init__(self):
        self.tokens, self.padded = [], []

    def varlen(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert causal
        self.tokens.append(len(q))
        parts = []
        for begin, end in itertools.pairwise(cu_seqlens_q):
            assert end - begin <= max_seqlen_q
            parts.append(self._attend(q[None, begin:end], k[None, begin:end], v[None, begin:end], softmax_scale)[0])
        return torch.cat(parts)

    def whole(self, q, k, v, softmax_scale=None, causal=False):
        assert causal
        self.padded.append(q.shape[:2])
        return self._attend(q, k, v, softmax_scale)

    def _attend(self, *qkv_and_scale):
        *qkv, scale = qkv_and_scale
        q, k, v = (t.transpose(1, 2) for t in qkv)
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.fixture
def kernels(monkeypatch):
    kernels = Kernels()
    functions = (kernels.whole, kernels.varlen, None, flash._pad_input, flash._unpad_input)
    processing = (flash._lazy_define_process_function(kernels.varlen), None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, processing))
    return kernels


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model_class, config = FAMILIES["qwen3"]
    return save(tmp_path_factory.mktemp("policy") / "qwen3", model_class, config())


def policies(directory, implementation):
    """With the implementation, and with sdpa; loading the first would ask for the package."""
    with_flash, dense = (tiny_policy(directory, attn_implementation="sdpa") for _ in range(2))
    with_flash.causal_lm.config._attn_implementation = implementation
    with_flash._layout = choose_layout(with_flash.causal_lm.config)
    assert with_flash._layout == "sequences"
    return with_flash, dense


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_kernel_gets_no_padding_and_the_result_is_that_of_sdpa(directory, kernels, implementation, name):
    with_flash, dense = policies(directory, implementation)
    batch = pack(make_rows(LENGTHS[name]), 0.7)
    with float64_throughout(with_flash.causal_lm), float64_throughout(dense.causal_lm):
        got, expected = with_flash.token_logprobs(batch), dense.token_logprobs(batch)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=0, atol=1e-10)
    # The last token of a completion predicts nothing.
    lengths = [prompt + length - 1 for prompt, completions in LENGTHS[name] for length in completions]
    layers = with_flash.causal_lm.config.num_hidden_layers
    if len(set(lengths)) == 1:
        assert kernels.padded == [(len(lengths), lengths[0])] * layers
        assert not kernels.tokens
    else:
        assert kernels.tokens == [sum(lengths)] * layers
        assert not kernels.padded
    wanted = gradients(dense, expected.logprobs)
    for parameter, gradient in gradients(with_flash, got.logprobs).items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-8, atol=1e-9)

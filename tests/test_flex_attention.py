"""FlexAttention over the packed batch, as far as a CPU has it: its forward pass."""

import inspect

import pytest
import torch
from fakes import FakeEngine
from runs import MODEL, data, trainer
from test_policy import FAMILIES, ROWS, gradients, make_rows, save, tiny_policy

from grpo_lightning import GRPOModule
from grpo_lightning.attention import dense_mask, flex_mask
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.packing import pack


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return {name: save(root / name, model_class, config()) for name, (model_class, config) in FAMILIES.items()}


@pytest.fixture
def uncompiled():
    """transformers compiles it, which on CPU takes longer than these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_the_mask_is_that_of_sdpa(lengths):
    batch = pack(make_rows(lengths), 1.0)
    mask = flex_mask(batch)
    assert mask.shape == (1, 1, batch.num_tokens, batch.num_tokens)
    token = torch.arange(batch.num_tokens)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.mask_mod(zero, zero, token[:, None], token[None]), dense_mask(batch)[0, 0])


def test_blocks_that_see_nothing_are_left_out():
    batch = pack(make_rows([(130, (150, 140)), (100, (200,))]), 1.0)
    whole = dense_mask(batch)[0, 0]
    blocks = flex_mask(batch).to_dense()[0, 0].bool()
    for row in range(blocks.shape[0]):
        for column in range(blocks.shape[1]):
            part = whole[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert bool(blocks[row, column]) == bool(part.any()), (row, column)
    assert not blocks.all()
    assert not blocks.tril().equal(torch.ones_like(blocks).tril())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_the_forward_pass_is_that_of_sdpa(directories, family, lengths):
    flex, dense = (tiny_policy(directories[family], attn_implementation=name) for name in ("flex_attention", "sdpa"))
    assert flex.causal_lm.config._attn_implementation == "flex_attention"
    assert flex._layout == "packed"
    batch = pack(make_rows(lengths), 0.7)
    with torch.no_grad():
        got, expected = flex.token_logprobs(batch), dense.token_logprobs(batch)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_compiled_it_is_the_same(directories):
    flex, dense = (tiny_policy(directories["qwen3"], attn_implementation=name) for name in ("flex_attention", "sdpa"))
    flex.float()
    batch = pack(make_rows(ROWS["mixed"]), 0.7)
    with torch.no_grad():
        got, expected = flex.token_logprobs(batch), dense.token_logprobs(batch)
    torch.testing.assert_close(got.logprobs.double(), expected.logprobs, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_gradient_is_that_of_sdpa(directories, checkpointing, monkeypatch):
    """PyTorch refuses a backward pass on CPU, but its plain implementation, which GPUs have too, computes one."""
    module = inspect.getmodule(torch.nn.attention.flex_attention.flex_attention)
    flex, dense = (
        tiny_policy(directories["qwen3"], attn_implementation=name, gradient_checkpointing=checkpointing)
        for name in ("flex_attention", "sdpa")
    )
    batch = pack(make_rows(ROWS["mixed"]), 0.7)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex.token_logprobs(batch)
    monkeypatch.setattr(module, "_validate_device", lambda query, key, value: None)
    expected = gradients(dense, dense.token_logprobs(batch).logprobs)
    for name, gradient in gradients(flex, flex.token_logprobs(batch).logprobs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)


def test_training_with_it_on_cpu_is_refused_before_the_engine_starts(tmp_path, tiny_model):
    engine = FakeEngine()
    module = GRPOModule(tiny_model, attn_implementation="flex_attention", **MODEL)
    with pytest.raises(ConfigurationError, match="on CPU, where PyTorch has no backward pass for it; 'grpo_shared"):
        trainer(tmp_path).fit(module, data(engine))
    assert not engine.specs

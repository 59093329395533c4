import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from fakes import make_row

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.logprobs import DEFAULT_CHUNK_BYTES
from grpo_lightning.loading import adapter_settings, load_policy
from grpo_lightning.memory import BatchShape, NoEstimateError, estimate_memory
from grpo_lightning.rollout.packing import pack

SHAPE = BatchShape(prompts=2, samples=4, prompt_tokens=24, completion_tokens=32)


def config_of(model):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def estimate(model, shape=SHAPE, *, full=False, **settings):
    adapter = None if full else adapter_settings(lora_rank=4)
    return estimate_memory(config_of(model), adapter, shape, **{"dtype": torch.float32, **settings})


def test_weights_are_counted_exactly(tiny_qwen3):
    policy, found = load_policy(tiny_qwen3, dtype="float32", lora_rank=4), estimate(tiny_qwen3, hold_reference=True)
    trained = sum(p.nbytes for p in policy.trainable_parameters().values())
    assert found.weights == sum(p.nbytes for p in policy.parameters()) - trained
    assert (found.trained, found.reference, found.update) == (4 * trained, trained, 2 * trained)
    half = estimate(tiny_qwen3, dtype=torch.bfloat16)
    assert half.weights == found.weights // 2
    assert half.trained == found.trained, "the adapter stays float32"
    full = estimate(tiny_qwen3, full=True)
    assert (full.weights, full.trained, full.reference) == (0, 4 * found.weights, 0)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_the_policy_saves(model, dtype, request):
    """Against the forward pass with real tensors; the packed batch has one input token less a completion."""
    model = request.getfixturevalue(model)
    policy = load_policy(model, dtype=dtype, lora_rank=4)
    batch = pack([make_row((4,) * 24, [(5,) * 32] * 4)] * 2, 1.0)
    fixed = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in fixed:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.token_logprobs(batch)
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert estimate(model, dtype=getattr(torch, dtype)).activations == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("field", ["prompts", "samples", "prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_tokens_take_more(tiny_model, field, checkpointing):
    sizes = [
        estimate(tiny_model, replace(SHAPE, **{field: count}), gradient_checkpointing=checkpointing).activations
        for count in (1, 2, 8, 64)
    ]
    assert sizes == sorted(set(sizes))


def test_checkpointing_takes_less(tiny_model):
    plain, less = estimate(tiny_model), estimate(tiny_model, gradient_checkpointing=True)
    assert less.activations < 0.7 * plain.activations  # the model has two layers, one of which is whole
    assert replace(less, activations=plain.activations) == plain


def test_logits_are_bounded_by_the_chunk(tiny_model):
    config = config_of(tiny_model)
    config.vocab_size = 1_000_000
    adapter, sizes = adapter_settings(lora_rank=4), []
    for tokens in (1, 8, 64, 512):
        shape = replace(SHAPE, completion_tokens=tokens)
        sizes.append(estimate_memory(config, adapter, shape, dtype=torch.float32).logits)
    blocks = 4 * 1_000_000 * 4  # a line of this vocabulary is longer than a block
    assert sizes[0] == 8 * 1_000_000 * 4 + blocks
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3] <= DEFAULT_CHUNK_BYTES + blocks


def test_the_update_counts_where_it_is_the_peak(tiny_model):
    small = estimate(tiny_model, BatchShape(1, 2, 1, 1), full=True)
    assert small.update > small.activations + small.logits
    assert small.trainer == small.trained + small.update
    large = estimate(tiny_model)
    assert large.trainer == large.weights + large.trained + large.activations + large.logits


def test_the_engine(tiny_qwen3):
    found = estimate(tiny_qwen3, engine_dtype=torch.bfloat16)
    assert found.engine_weights == found.weights // 2


def test_a_mixture_of_experts_has_no_estimate():
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**TINY, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    adapter = adapter_settings(lora_rank=4)
    with pytest.raises(NoEstimateError, match="^Qwen3MoeConfig without weights: "):
        estimate_memory(config, adapter, SHAPE, dtype=torch.float32)


def test_a_nested_configuration_has_no_estimate():
    from transformers import Gemma3Config, Gemma3TextConfig

    config = Gemma3Config(text_config=Gemma3TextConfig(**TINY, head_dim=16))
    with pytest.raises(NoEstimateError, match="not a softmax-attention transformer"):
        estimate_memory(config, adapter_settings(lora_rank=4), SHAPE, dtype=torch.float32)


def test_what_does_not_share_prompts_has_no_estimate(tiny_model):
    with pytest.raises(NoEstimateError, match="'flash_attention_2' cannot take the shared-prompt mask"):
        estimate(tiny_model, attn_implementation="flash_attention_2")


def test_targets_that_the_model_lacks_are_still_refused(tiny_model):
    with pytest.raises(ConfigurationError, match="expected lora_targets among the model's layers"):
        estimate_memory(config_of(tiny_model), adapter_settings(lora_targets=["q_prj"]), SHAPE, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("shape", [BatchShape(1, 4, 64, 96), BatchShape(2, 4, 64, 128)], ids=["448", "1152"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_within_15_percent_of_the_peak(demo_model, dtype, shape, checkpointing):
    # Each large tensor gets its own pages and gives them back; glibc's default keeps and splinters them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    sizes = (shape.prompts, shape.samples, shape.prompt_tokens, shape.completion_tokens, int(checkpointing))
    command = [sys.executable, str(Path(__file__).with_name("memory_step.py")), dtype, *map(str, sizes)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured = int(result.stdout.split("peak")[1])
    found = estimate_memory(
        config_of(demo_model),
        adapter_settings(),
        shape,
        dtype=getattr(torch, dtype),
        gradient_checkpointing=checkpointing,
    )
    print(f"\nmeasured {measured / 2**20:.0f} MiB, estimated {found.trainer / 2**20:.0f} MiB")
    assert found.trainer == pytest.approx(measured, rel=0.15)

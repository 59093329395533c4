import time

import pytest

from grpo_lightning import VLLMEngine
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.vllm_args import refuse_unknown_args


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("top_p", "draw from another distribution than the one that the trainer differentiates"),
        ("top_k", "RolloutDataModule has a setting of that name"),
        ("min_p", "no correction for that is available"),
        ("generation_config", "another distribution"),
        ("override_generation_config", "another distribution"),
        ("logits_processors", "another distribution"),
        ("logprobs_mode", "processed_logprobs"),
        ("enable_lora", "sets it from the module's adapter"),
        ("max_loras", "sets it from the module's adapter"),
        ("lora_dtype", "has an argument of that name"),
        ("dtype", "has an argument of that name"),
        ("gpu_memory_utilization", "has an argument of that name"),
        ("tensor_parallel_size", "has an argument of that name"),
        ("enforce_eager", "has an argument of that name"),
        ("seed", "from the data module's seed"),
        ("max_model_len", "max_prompt_tokens [+] max_tokens"),
        ("model", "serves the module's model"),
        ("tokenizer", "in the same way"),
        ("skip_tokenizer_init", "in the same way"),
    ],
)
def test_breaking_arguments_are_refused_at_construction(name, reason):
    with pytest.raises(ConfigurationError, match=f"engine_args cannot hold '{name}': .*{reason}.*; leave it out"):
        VLLMEngine(engine_args={"max_num_batched_tokens": 64, name: 1})


def test_unknown_arguments_are_refused_with_similar_ones():
    known = {"max_num_seqs", "max_num_batched_tokens", "enable_lora", "_private"}
    with pytest.raises(ConfigurationError, match="no engine argument 'max_num_seq' .*did you mean max_num_seqs"):
        refuse_unknown_args(["max_num_seq"], known)
    with pytest.raises(ConfigurationError, match="no engine argument 'zzz' .*; see vllm.AsyncEngineArgs"):
        refuse_unknown_args(["zzz"], known)
    refuse_unknown_args(["max_num_seqs"], known)


def spec(**changes):
    return EngineSpec(**{"model": "none", "lora_rank": 4, "max_length": 96, "max_concurrency": 4, **changes})


def test_rank_that_vllm_cannot_serve_is_refused_at_start():
    with pytest.raises(ConfigurationError, match="lora_rank <= 512, .*got 513; lower it or use TransformersEngine"):
        VLLMEngine().start(spec(lora_rank=513))


@pytest.mark.vllm
def test_start_asks_vllm_for_its_arguments():
    pytest.importorskip("vllm")
    engine = VLLMEngine(engine_args={"max_num_seq": 4})
    begin = time.monotonic()
    with pytest.raises(ConfigurationError, match="did you mean max_num_seqs"):
        engine.start(spec())
    assert time.monotonic() - begin < 60
    engine.close()


def test_the_adapters_precision_follows_the_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert VLLMEngine().lora_dtype == "float32"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert VLLMEngine().lora_dtype == "auto"
    with pytest.raises(ConfigurationError, match="expected lora_dtype 'auto', 'bfloat16' or 'float16' on CUDA"):
        VLLMEngine(lora_dtype="float32").check(EngineSpec("model", 8, 64, 0))

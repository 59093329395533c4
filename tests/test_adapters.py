import json
import os

import pytest
import torch
from fakes import encode

from grpo_lightning.adapters import save_adapter
from grpo_lightning.errors import WriteError
from grpo_lightning.loading import load_policy

IDS = torch.tensor([encode("user: What is 3 + 4?\nassistant: ")])


@pytest.fixture(params=["tiny_model", "tiny_qwen3"])
def model(request):
    return request.getfixturevalue(request.param)


def trained(model, **settings):
    policy = load_policy(model, **{"attn_implementation": "sdpa", "lora_rank": 4, **settings})
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return policy


def reload(model, directory, dtype=torch.float32):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    return PeftModel.from_pretrained(base, directory).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_peft_loads_the_same_model(model, tmp_path):
    policy = trained(model)
    save_adapter(policy, tmp_path / "v1")
    again = reload(model, tmp_path / "v1")
    assert torch.equal(logits(again), logits(policy.model))
    with again.disable_adapter():
        assert (logits(again) - logits(policy.model)).abs().max() > 0.1


def test_every_trained_weight_is_there_exactly_and_nothing_else(model, tmp_path):
    from safetensors.torch import load_file

    policy = trained(model)
    save_adapter(policy, tmp_path / "v1")
    saved = load_file(tmp_path / "v1" / "adapter_model.safetensors")
    live = {name.replace(".default", ""): p for name, p in policy.trainable_parameters().items()}
    assert live.keys() == saved.keys()
    for name, parameter in live.items():
        assert torch.equal(saved[name], parameter), name
    assert len(saved) == 2 * 2 * 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_adapter_is_float32_whatever_the_base(tiny_model, tmp_path, dtype):
    from safetensors.torch import load_file

    policy = trained(tiny_model, dtype=dtype)
    save_adapter(policy, tmp_path / "v1")
    saved = load_file(tmp_path / "v1" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_a_bfloat16_adapter_is_written_as_float32(tiny_model, tmp_path):
    from safetensors.torch import load_file

    policy = trained(tiny_model)
    for parameter in policy.trainable_parameters().values():
        parameter.data = parameter.data.bfloat16()
    save_adapter(policy, tmp_path / "v1")
    saved = load_file(tmp_path / "v1" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.bfloat16}


def test_bfloat16_base_gives_the_same_logits_but_for_rounding(tiny_model, tmp_path):
    policy = trained(tiny_model, dtype="bfloat16")
    save_adapter(policy, tmp_path / "v1")
    exact = logits(reload(tiny_model, tmp_path / "v1", torch.float32))
    theirs = float((logits(reload(tiny_model, tmp_path / "v1", torch.bfloat16)) - exact).norm())
    # PEFT computes the adapter in float32; ours rounds between its factors too, which counts where it is as large as
    # the base, as here.
    assert float((logits(policy.model) - exact).norm()) < 2 * theirs < 0.2 * float(exact.norm())


def test_configuration_is_what_loaders_need(tiny_model, tmp_path):
    policy = trained(tiny_model, lora_rank=4, lora_alpha=12.0)
    save_adapter(policy, tmp_path / "v1")
    assert sorted(p.name for p in (tmp_path / "v1").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "v1" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["lora_alpha"] == 12.0
    assert config["base_model_name_or_path"] == tiny_model
    assert config["inference_mode"] is True
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-1] for name in config["target_modules"]} == layers


def test_saving_leaves_the_policy_in_training(tiny_model, tmp_path):
    policy = trained(tiny_model)
    before = {n: p.clone() for n, p in policy.trainable_parameters().items()}
    save_adapter(policy, tmp_path / "v1")
    assert policy.model.peft_config["default"].inference_mode is False
    assert policy.model.training
    after = policy.trainable_parameters()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_parents_are_made_and_versions_stand_beside_each_other(tiny_model, tmp_path):
    policy = trained(tiny_model)
    folder = tmp_path / "runs" / "a.b" / "adapters"
    for version in range(3):
        save_adapter(policy, folder / f"v{version}.0")
    assert sorted(p.name for p in folder.iterdir()) == ["v0.0", "v1.0", "v2.0"]


def test_an_existing_adapter_is_not_replaced(tiny_model, tmp_path):
    policy = trained(tiny_model)
    save_adapter(policy, tmp_path / "v1")
    content = (tmp_path / "v1" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.zero_()
    with pytest.raises(OSError, match="v1"):
        save_adapter(policy, tmp_path / "v1")
    assert (tmp_path / "v1" / "adapter_model.safetensors").read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["v1"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("step", ["weights", "half of the weights", "configuration", "sync", "rename"])
def test_whole_or_absent(tiny_model, tmp_path, monkeypatch, step, error):
    policy = trained(tiny_model)
    target = tmp_path / "adapters" / "v1"
    seen = []

    def fail(*args, **kwargs):
        seen.append(sorted(p.name for p in target.parent.iterdir()))
        assert not target.exists()
        raise error

    def fail_midway(state, path, **kwargs):
        path.write_bytes(b"half")
        fail()

    name, replacement = {
        "weights": ("safetensors.torch.save_file", fail),
        "half of the weights": ("safetensors.torch.save_file", fail_midway),
        "configuration": ("pathlib.Path.write_text", fail),
        "sync": ("os.fsync", fail),
        "rename": ("os.rename", fail),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(name, replacement)
        with pytest.raises(type(error)):
            save_adapter(policy, target)
    # It was being written somewhere else beside its target, and nothing of that is left.
    assert len(seen) == 1
    assert len(seen[0]) == 1
    assert seen[0][0].startswith(".")
    assert os.listdir(target.parent) == []
    assert policy.model.peft_config["default"].inference_mode is False
    # The next attempt works.
    save_adapter(policy, target)
    assert torch.equal(logits(reload(tiny_model, target)), logits(policy.model))


def test_a_full_disk_is_named_and_leaves_nothing(tiny_model, full_disk):
    (full_disk / "filler").write_bytes(b"0" * 1_000_000)
    with pytest.raises(WriteError, match=r"could not write .*v1: .*MiB are free there.*untouched: make space"):
        save_adapter(trained(tiny_model, lora_rank=64), full_disk / "v1")
    assert [path.name for path in full_disk.iterdir()] == ["filler"]

import pytest
import torch
from policies import logprobs, randomise

from grpo_lightning.diagnostics.base_weights import BaseWeights
from grpo_lightning.diagnostics.marker import families, marker, merged, rounded, scaled, without_effect
from grpo_lightning.loading import load_policy

FAMILIES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def policy(tiny_model):
    policy = load_policy(tiny_model, dtype="float32", lora_rank=4)
    randomise(policy)
    return policy


def test_families(policy, tiny_model):
    assert set(families(policy)) == FAMILIES
    assert sum(map(len, families(policy).values())) == len(policy.trainable_parameters())
    whole = families(load_policy(tiny_model, full_finetuning=True, dtype="float32"))
    assert set(whole) > {*FAMILIES, "embed_tokens", "input_layernorm"}


def changes(policy, weights):
    """Norm of each module's change over the norm of its weight."""
    with policy._holding(weights):
        return {
            name: float(module.get_delta_weight("default").norm() / module.get_base_layer().weight.norm())
            for name, module in policy.model.named_modules()
            if "default" in getattr(module, "lora_B", {})
        }


def test_a_marker_has_its_size_in_its_family_alone(policy):
    weights = marker(policy, families(policy)["v_proj"], size=0.3)
    for name, change in changes(policy, weights).items():
        assert change == (pytest.approx(0.3, rel=0.3) if "v_proj" in name else 0), name
    assert all(torch.equal(w, rounded(weights, torch.bfloat16)[n]) for n, w in weights.items() if "v_proj" in n)
    halved = changes(policy, scaled(policy, weights, 0.5))
    assert halved == pytest.approx({n: c / 2 for n, c in changes(policy, weights).items()})


def test_without_effect_is_the_base_model(policy):
    with policy.base():
        base = logprobs(policy)
    with policy._holding(without_effect(policy)):
        assert torch.equal(logprobs(policy), base)


def test_markers_of_whole_models(tiny_model):
    policy = load_policy(tiny_model, full_finetuning=True, dtype="float32")
    own = {n: p.detach().clone() for n, p in policy.trainable_parameters().items()}
    weights = marker(policy, families(policy)["q_proj"], size=0.3)
    for name, weight in weights.items():
        change = float((weight - own[name]).norm() / own[name].norm())
        assert change == (pytest.approx(0.3, rel=0.2) if "q_proj" in name else 0)
        assert torch.equal(policy.trainable_parameters()[name], own[name])


def test_merging_leaves_no_trace(policy):
    start = BaseWeights(policy)
    own = logprobs(policy)
    weights = {n: p.detach() for n, p in policy.trainable_parameters().items()}
    with merged(policy, weights, torch.float32, rounded_first=False):
        assert torch.allclose(logprobs(policy), own, atol=1e-5)
    with merged(policy, weights, torch.bfloat16, rounded_first=False):
        assert 1e-4 < float((logprobs(policy) - own).abs().max()) < 0.2
    assert torch.equal(logprobs(policy), own)
    assert start.changed(policy, everything=True)[0] == []


def test_a_changed_element_of_the_base_is_found_within_16_turns(policy):
    start = BaseWeights(policy)
    name, weight = next((n, p) for n, p in policy.model.named_parameters() if not p.requires_grad)
    assert all(start.changed(policy)[0] == [] for _ in range(16))
    with torch.no_grad():
        weight.view(-1)[1] += 1e-4
    assert [name] in [start.changed(policy)[0] for _ in range(16)]
    assert start.changed(policy, everything=True)[0] == [name]

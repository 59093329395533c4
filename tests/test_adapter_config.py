import pytest

from grpo_lightning.adapter_config import check_servable, continued_config, fresh_config, largest_rank
from grpo_lightning.errors import ConfigurationError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
REFUSED = [
    {"use_dora": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"lora_bias": True},
    {"modules_to_save": ["lm_head"]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "corda"},
    {"alora_invocation_tokens": [1, 2]},
    {"layer_replication": [[0, 1], [0, 1]]},
    {"use_qalora": True},
    {"use_bdlora": {"nblocks": 2}},
]
SERVED = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 4}},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": False},
]
KEEP = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}


def name(config):
    return " ".join(f"{k}={v}" for k, v in config.items()) or "plain"


@pytest.mark.parametrize("change", REFUSED, ids=name)
def test_what_vllm_refuses_is_refused(change):
    (field,) = change
    with pytest.raises(ConfigurationError, match=f"expected a plain LoRA adapter.*folder has {field}="):
        check_servable({**PLAIN, **change}, "folder")


def test_every_field_in_the_way_is_named():
    with pytest.raises(ConfigurationError, match=r"use_dora=True \(DoRA\), bias='all'.*Convert it with PEFT"):
        check_servable({**PLAIN, "use_dora": True, "bias": "all"}, "folder")


@pytest.mark.parametrize("change", SERVED, ids=name)
def test_what_vllm_serves_is_accepted(change):
    check_servable({**PLAIN, **change}, "folder")


@pytest.mark.parametrize("change", REFUSED + SERVED, ids=name)
def test_vllm_agrees(change):
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper.from_dict({**PLAIN, **change})
    refused = bool(helper._validate_features()) or helper.bias != "none"
    assert refused == (change in REFUSED)


@pytest.mark.parametrize("field", ["trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config"])
def test_what_vllm_would_ignore_is_refused(field):
    with pytest.raises(ConfigurationError, match=field):
        check_servable({**PLAIN, field: {"a": 1}}, "folder")


def test_other_kinds_of_adapters_are_refused():
    with pytest.raises(ConfigurationError, match="expected a LoRA adapter in folder, but got peft_type='IA3'"):
        check_servable({**PLAIN, "peft_type": "IA3"}, "folder")


def test_adapters_of_bare_parameters_are_refused():
    config = {**PLAIN, "target_modules": None, "target_parameters": ["mlp.experts.gate_up_proj"]}
    with pytest.raises(ConfigurationError, match=r"has target_parameters=\[.*\] \(adapters of bare parameters\)"):
        continued_config(config, "folder", **KEEP)


@pytest.mark.parametrize("targets", [None, []])
def test_an_adapter_of_no_layers_is_refused(targets):
    with pytest.raises(ConfigurationError, match="expected target_modules in folder, .* but got none"):
        continued_config({**PLAIN, "target_modules": targets}, "folder", **KEEP)


@pytest.mark.parametrize("change", [{"r": 0}, {"r": None}, {"rank_pattern": {"q_proj": 0}}], ids=name)
def test_impossible_ranks_are_refused(change):
    with pytest.raises(ConfigurationError, match=r"expected a rank >= 1 in folder, but got (r|q_proj)=(0|None)"):
        check_servable({**PLAIN, **change}, "folder")


def test_engines_need_room_for_the_largest_rank():
    assert largest_rank(PLAIN) == 8
    assert largest_rank({**PLAIN, "rank_pattern": None}) == 8
    assert largest_rank({**PLAIN, "rank_pattern": {"q_proj": 64, "v_proj": 2}}) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, r"lora_rank=4 \(the adapter's is 8\)"),
        ({"alpha": 8.0}, r"lora_alpha=8.0 \(the adapter's is 16\)"),
        ({"targets": ["q_proj"]}, r"lora_targets=\['q_proj'\] \(the adapter's is \['q_proj', 'v_proj'\]\)"),
        ({"rank": 4, "alpha": 8.0}, "lora_rank=4.*lora_alpha=8.0"),
    ],
)
def test_settings_beside_an_adapter_must_not_contradict_it(change, message):
    with pytest.raises(ConfigurationError, match=f"from the adapter in folder, but got {message}.*leave them out"):
        continued_config(PLAIN, "folder", **{**KEEP, **change})


@pytest.mark.parametrize(
    "change", [{}, {"rank": 8}, {"alpha": 16.0}, {"targets": ["v_proj", "q_proj"]}, {"dropout": 0.1}], ids=name
)
def test_settings_that_agree_are_accepted(change):
    config = continued_config({**PLAIN, "lora_dropout": 0.3}, "folder", **{**KEEP, **change})
    assert {**config, **{k: PLAIN[k] for k in ("r", "lora_alpha", "target_modules")}} == config
    # Dropout belongs to the training, not to the adapter.
    assert config["lora_dropout"] == change.get("dropout", 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "expected lora_rank >= 1, but got 0"),
        ({"alpha": 0.0}, "lora_alpha > 0"),
        ({"dropout": 1.0}, r"lora_dropout in \[0, 1\)"),
        ({"targets": []}, "at least one name in lora_targets"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        fresh_config(**{**KEEP, **change})


def test_a_fresh_adapter_is_servable():
    check_servable(fresh_config(**KEEP), "our settings")

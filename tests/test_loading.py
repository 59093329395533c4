import json
import shutil

import pytest
import torch
from fakes import FakeEngine
from policies import batch, fit, logprobs, make_adapter, module, randomise, relaxed

from grpo_lightning import GRPOModule, TransformersEngine, VLLMEngine
from grpo_lightning.adapter_config import fresh_config
from grpo_lightning.adapters import adapter_digest, read_adapter_weights, save_adapter, write_adapter
from grpo_lightning.callbacks import RatioDegeneracyDetector
from grpo_lightning.errors import ConfigurationError, DegeneracyError
from grpo_lightning.loading import load_policy, with_adapter
from grpo_lightning.policy import Policy
from grpo_lightning.rollout.types import AdapterRef


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "sft")


@pytest.fixture
def policy(tiny_model, adapter):
    return load_policy(tiny_model, adapter=str(adapter), dtype="float32", attn_implementation="sdpa")


class TestAdapter:
    def test_it_is_what_peft_loads(self, tiny_model, adapter, policy):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa")
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            expected = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
            torch.testing.assert_close(policy.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)

    def test_its_settings_come_from_the_folder(self, policy, adapter):
        saved, config = json.loads((adapter / "adapter_config.json").read_text()), policy.adapter_config()
        for name in ("r", "lora_alpha", "use_rslora"):
            assert config[name] == saved[name]
        assert sorted(config["target_modules"]) == sorted(saved["target_modules"])
        assert config["r"] == 5

    @pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
    def test_it_is_float32_whatever_it_was_saved_in(self, tiny_model, tmp_path, saved):
        from safetensors.torch import load_file, save_file

        folder = make_adapter(tiny_model, tmp_path / "a")
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(saved) for name, tensor in load_file(path).items()}, path)
        assert {tensor.dtype for tensor in read_adapter_weights(folder).values()} == {torch.float32}
        policy = load_policy(tiny_model, adapter=str(folder), dtype="bfloat16")
        assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
        assert policy.causal_lm.dtype == torch.bfloat16
        again = save_and_read(policy, tmp_path / "b")
        assert all(torch.equal(again[n], t) for n, t in read_adapter_weights(folder).items())

    def test_weights_in_bin_format_load(self, tiny_model, tmp_path, adapter):
        folder = shutil.copytree(adapter, tmp_path / "bin")
        torch.save(read_adapter_weights(folder), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
        policy = load_policy(tiny_model, adapter=str(folder), dtype="float32")
        again = save_and_read(policy, tmp_path / "b")
        assert all(torch.equal(again[n], t) for n, t in read_adapter_weights(adapter).items())

    def test_an_initialisation_is_not_repeated(self, tiny_model, tmp_path):
        folder = make_adapter(tiny_model, tmp_path / "a", config={"init_lora_weights": "eva"})
        policy = load_policy(tiny_model, adapter=str(folder), dtype="float32")
        again = save_and_read(policy, tmp_path / "b")
        assert all(torch.equal(again[n], t) for n, t in read_adapter_weights(folder).items())

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "no adapter_config.json in .*give a local folder"),
            ({"adapter_config.json": "{}"}, "expected adapter_model.safetensors or adapter_model.bin in"),
            ({"adapter_config.json": "{", "adapter_model.bin": ""}, "expected JSON in"),
            ({"adapter_config.json": "[]", "adapter_model.bin": ""}, "expected a JSON object in"),
        ],
    )
    def test_folders_without_an_adapter_are_refused_at_once(self, tmp_path, files, message):
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        with pytest.raises(ConfigurationError, match=message):
            GRPOModule("no-such-model", adapter=str(tmp_path))

    def test_contradictions_are_refused_at_once(self, tmp_path, adapter):
        with pytest.raises(ConfigurationError, match="lora_rank=4"):
            GRPOModule("no-such-model", adapter=str(adapter), lora_rank=4)
        dora = shutil.copytree(adapter, tmp_path / "dora")
        config = json.loads((dora / "adapter_config.json").read_text())
        (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
        with pytest.raises(ConfigurationError, match="use_dora=True"):
            GRPOModule("no-such-model", adapter=str(dora))

    def test_one_of_another_shape_is_refused(self, tiny_qwen3, adapter):
        with pytest.raises(
            ConfigurationError, match=r"made for another model: \d+ of its tensors.*has shape .*expecte"
        ):
            load_policy(tiny_qwen3, adapter=str(adapter))

    def test_one_with_other_tensors_is_refused(self, tiny_model, tmp_path, adapter):
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(adapter, tmp_path / "other")
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        state["base_model.model.model.layers.7.mlp.lora_A.weight"] = state.pop(min(state))
        save_file(state, path)
        with pytest.raises(
            ConfigurationError, match=r"2 of its tensors do not fit: .*lora_A.weight is missing; .*layers.7.*no place"
        ):
            load_policy(tiny_model, adapter=str(folder))

    def test_one_whose_layers_are_not_there_is_refused(self, tiny_model, tmp_path, adapter):
        folder = shutil.copytree(adapter, tmp_path / "other")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
        with pytest.raises(ConfigurationError, match="made for another model: .*nothing matches 'c_attn'"):
            load_policy(tiny_model, adapter=str(folder))


def save_and_read(policy, directory):
    save_adapter(policy, directory)
    return read_adapter_weights(directory)


class TestTargets:
    @pytest.mark.parametrize("targets", [["q_prj"], ["q_prj", "v_proj"], "q_prj"])
    def test_names_that_match_nothing_are_refused(self, tiny_model, targets):
        with pytest.raises(
            ConfigurationError,
            match=r"\(down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\), but nothing matches 'q_prj'; "
            "did you mean 'q_proj'",
        ):
            load_policy(tiny_model, lora_targets=targets)

    @pytest.mark.parametrize("targets", [["q_prj"], ["v_proj", "up_prj"], "q_prj", ".*k_prj", "o-proj"])
    def test_suggestions_can_be_followed(self, tiny_model, targets):
        with pytest.raises(ConfigurationError) as error:
            load_policy(tiny_model, lora_targets=targets)
        suggestion = str(error.value).rsplit("did you mean ", 1)[1].strip("'?")
        names = load_policy(tiny_model, lora_targets=suggestion).trainable_parameters()
        assert names
        assert all(f".{suggestion}." in name for name in names)

    @pytest.mark.parametrize("pattern", ["*q_proj", "(q|v_proj"])
    def test_patterns_that_are_none_are_refused_at_once(self, pattern):
        with pytest.raises(
            ConfigurationError, match="expected lora_targets to be names .* as in '.[*]q_proj'"
        ) as error:
            GRPOModule("no-such-model", lora_targets=pattern)
        assert repr(pattern) in str(error.value)

    def test_a_name_beside_an_adapter_may_repeat_it(self, tmp_path, tiny_model):
        save_adapter(load_policy(tiny_model, lora_targets="q_proj"), tmp_path / "a")
        load_policy(tiny_model, adapter=str(tmp_path / "a"), lora_targets="q_proj")

    @pytest.mark.parametrize("targets", [["q_proj", "layers.0.mlp.up_proj"], r".*\.1\..*q_proj", "all-linear"])
    def test_names_that_match_are_accepted(self, tiny_model, targets):
        assert load_policy(tiny_model, lora_targets=targets).trainable_parameters()


class TestReference:
    def test_it_is_the_adapter_as_it_was(self, policy):
        start = logprobs(policy)
        randomise(policy, seed=7)
        assert (logprobs(policy) - start).abs().max() > 0.1
        with policy.reference():
            assert torch.equal(policy.token_logprobs(batch())[0], start)

    def test_the_base_has_no_adapter(self, tiny_model, policy):
        fresh = load_policy(tiny_model, dtype="float32", attn_implementation="sdpa")
        with policy.base():
            assert torch.equal(policy.token_logprobs(batch())[0], logprobs(fresh))
        assert (logprobs(policy) - logprobs(fresh)).abs().max() > 0.1

    @pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16-mixed"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
    def test_a_step_around_it_is_not_disturbed(self, tiny_model, adapter, precision, checkpointing, full):
        """As in the training step: forward, reference, backward. Autocast would give the reference cached casts."""
        start = {"full_finetuning": True} if full else {"adapter": str(adapter)}
        policy = load_policy(tiny_model, dtype="float32", gradient_checkpointing=checkpointing, **start)
        parameters = policy.trainable_parameters()
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            before = logprobs(policy)
        randomise(policy, seed=7)

        def gradients(with_reference):
            with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
                current, *_ = policy.token_logprobs(batch())
                if with_reference:
                    with policy.reference():
                        reference, *_ = policy.token_logprobs(batch())
                    assert torch.equal(reference, before)
                    assert not reference.requires_grad
            return torch.autograd.grad(current.sum(), list(parameters.values()))

        alone, around = gradients(False), gradients(True)
        assert all(torch.equal(a, b) for a, b in zip(alone, around, strict=True))
        assert any(float(g.abs().max()) > 0 for g in alone)
        after = policy.trainable_parameters()
        assert after.keys() == parameters.keys()
        assert all(after[n] is parameters[n] and after[n].requires_grad for n in after)

    def test_the_policy_comes_back_after_an_error(self, policy):
        randomise(policy, seed=7)
        before = logprobs(policy)
        with pytest.raises(KeyError), policy.reference():
            raise KeyError
        assert torch.equal(logprobs(policy), before)
        assert torch.is_autocast_cache_enabled()

    def test_it_survives_conversion(self, policy):
        start = {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}
        randomise(policy, seed=7)
        policy.to(torch.bfloat16)
        with policy.reference():
            now = policy.trainable_parameters()
            assert all(torch.equal(now[name], tensor) for name, tensor in start.items())


class TestTraining:
    def test_version_0_is_the_adapter_itself(self, tmp_path, tiny_model, adapter):
        published = []

        class Keep(FakeEngine):
            def load_adapter(self, ref):
                super().load_adapter(ref)
                published.append((ref.version, read_adapter_weights(ref.path)))

        engine = Keep()
        fit(tmp_path, module(tiny_model, adapter=str(adapter)), engine, callbacks=[relaxed()])
        version, weights = published[0]
        assert version == 0
        assert all(torch.equal(weights[name], tensor) for name, tensor in read_adapter_weights(adapter).items())
        assert [spec.lora_rank for spec in engine.specs] == [5]

    def test_the_engine_has_room_for_the_largest_rank(self, tmp_path, tiny_model, adapter):
        config = json.loads((adapter / "adapter_config.json").read_text())
        folder = shutil.copytree(adapter, tmp_path / "pattern")
        (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 24}}))
        assert GRPOModule(tiny_model, adapter=str(folder)).adapter_rank == 24

    def test_resuming_keeps_weights_and_reference(self, tmp_path, tiny_model, adapter):
        settings = {"adapter": str(adapter), "kl_coef": 0.1}
        whole = module(tiny_model, **settings)
        trainer = fit(tmp_path / "whole", whole, FakeEngine(), epochs=2, callbacks=[relaxed()])
        assert float(trainer.callback_metrics["policy/kl_reference"]) > 0
        fit(tmp_path / "parts", module(tiny_model, **settings), FakeEngine(), callbacks=[relaxed()])
        resumed = module(tiny_model, **settings)
        last = tmp_path / "parts" / "last.ckpt"
        fit(tmp_path / "parts", resumed, FakeEngine(), epochs=2, ckpt_path=last, callbacks=[relaxed()])
        for name, parameter in whole.policy.trainable_parameters().items():
            assert torch.equal(parameter, resumed.policy.trainable_parameters()[name]), name
        with resumed.policy.reference():
            again = save_and_read(resumed.policy, tmp_path / "reference")
        assert all(torch.equal(again[n], t) for n, t in read_adapter_weights(adapter).items())
        state = torch.load(last, weights_only=True)["state_dict"]
        assert len(state) == len(resumed.policy.trainable_parameters())

    def test_a_folder_of_the_same_content_elsewhere_will_do(self, tmp_path, tiny_model, adapter):
        fit(tmp_path, module(tiny_model, adapter=str(adapter)), FakeEngine(), callbacks=[relaxed()])
        copy = shutil.copytree(adapter, tmp_path / "copy")
        (copy / "README.md").write_text("A card.")
        resumed = module(tiny_model, adapter=str(copy))
        fit(tmp_path, resumed, FakeEngine(), epochs=2, ckpt_path=tmp_path / "last.ckpt", callbacks=[relaxed()])
        assert resumed.policy_version == 2

    @pytest.mark.parametrize(
        ("first", "then", "message"),
        [
            ("sft", "changed", "the content of .*changed is another one's by now"),
            ("sft", None, "the adapter that training started from, but got none"),
            (None, "sft", "expected a fresh adapter, but got adapter="),
        ],
    )
    def test_another_start_is_refused(self, tmp_path, tiny_model, adapter, first, then, message):
        changed = make_adapter(tiny_model, tmp_path / "changed", seed=2)
        folders = {"sft": {"adapter": str(adapter)}, "changed": {"adapter": str(changed)}, None: {"lora_rank": 5}}
        fit(tmp_path, module(tiny_model, **folders[first]), FakeEngine(), callbacks=[relaxed()])
        with pytest.raises(ConfigurationError, match=message):
            fit(tmp_path, module(tiny_model, **folders[then]), FakeEngine(), ckpt_path=tmp_path / "last.ckpt")

    @pytest.mark.parametrize("change", [{"lora_alpha": 8.0}, {"lora_rank": 4}])
    def test_a_checkpoint_of_another_scale_is_refused(self, tmp_path, tiny_model, change):
        fit(tmp_path, module(tiny_model), FakeEngine(), callbacks=[relaxed()])
        with pytest.raises(ConfigurationError, match=r"expected the checkpoint's adapter setting (lora_alpha=32|r=16)"):
            fit(tmp_path, module(tiny_model, **change), FakeEngine(), ckpt_path=tmp_path / "last.ckpt")

    def test_an_engine_that_serves_the_base_is_found_before_the_first_update(self, tmp_path, tiny_model, adapter):
        class Deaf(TransformersEngine):
            """It says that it has the adapter, and has one that changes nothing."""

            def load_adapter(self, ref):
                fresh = ref.path.parent / "fresh"
                save_adapter(load_policy(tiny_model, lora_rank=5), fresh)
                super().load_adapter(AdapterRef(ref.name, ref.id, fresh, ref.version))

        with pytest.raises(DegeneracyError, match="samples from .nearly. the base model although an adapter"):
            fit(tmp_path, module(tiny_model, adapter=str(adapter)), Deaf(dtype="float32"), callbacks=[relaxed()])
        healthy = RatioDegeneracyDetector()
        run = fit(
            tmp_path,
            module(tiny_model, adapter=str(adapter)),
            TransformersEngine(dtype="float32"),
            callbacks=[healthy],
        )
        assert run.global_step == 1
        assert {v.check: v.status.value for v in healthy.verdicts}["served adapter"] == "pass"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_serves_ranks_and_scales_of_single_layers(tmp_path, tiny_qwen3_for_vllm):
    from peft import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    config = {
        **fresh_config(rank=5, alpha=12.0, dropout=0.0, targets="all-linear"),
        "use_rslora": True,
        "rank_pattern": {"q_proj": 12},
        "alpha_pattern": {"v_proj": 3.0, "down_proj": 20.0},
    }
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3_for_vllm, dtype=torch.float32)
    start = Policy(with_adapter(base, config))
    randomise(start)
    write_adapter(get_peft_model_state_dict(start.model), start.adapter_config(), tmp_path / "adapter")
    detector = RatioDegeneracyDetector()
    trained = module(tiny_qwen3_for_vllm, adapter=str(tmp_path / "adapter"), kl_coef=0.05)
    fit(tmp_path, trained, VLLMEngine(dtype="float32"), epochs=2, callbacks=[detector])
    verdicts = {v.check: v for v in detector.verdicts}
    assert verdicts["served adapter"].evidence["alpha"] == pytest.approx(1, abs=1e-3)
    assert verdicts["mismatch"].evidence["mismatch RMS"] < 1e-4


class TestCheckpointFormats:
    """Models as `save_pretrained` cuts them."""

    @pytest.mark.parametrize("model", ["tiny_model", "tiny_qwen3"])
    def test_a_sharded_model_trains(self, tmp_path, model, request):
        from transformers import AutoModelForCausalLM

        model = request.getfixturevalue(model)
        sharded = shutil.copytree(model, tmp_path / "sharded")
        (sharded / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="20KB")
        assert len(list(sharded.glob("model-*.safetensors"))) > 2
        expected = logprobs(load_policy(model, dtype="float32"))
        assert torch.equal(logprobs(load_policy(str(sharded), dtype="float32")), expected)
        trained = module(str(sharded))
        assert fit(tmp_path, trained, TransformersEngine(dtype="float32")).global_step == 1

    def test_bin_weights_load_as_transformers_loads_them(self, tmp_path, tiny_model):
        from safetensors.torch import load_file

        folder = shutil.copytree(tiny_model, tmp_path / "bin")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        expected = logprobs(load_policy(tiny_model, dtype="float32"))
        assert torch.equal(logprobs(load_policy(str(folder), dtype="float32")), expected)


def test_the_digest_is_of_content(tmp_path, adapter):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert adapter_digest(copy) == adapter_digest(adapter)
    with (copy / "adapter_config.json").open("a") as file:
        file.write(" ")
    assert adapter_digest(copy) != adapter_digest(adapter)

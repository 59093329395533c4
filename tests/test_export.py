import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from fakes import FakeEngine, encode
from lightning.pytorch.callbacks import ModelCheckpoint
from policies import fit, make_adapter, module, randomise
from runs import data, trainer

from grpo_lightning import TransformersEngine
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.export import export

PROMPTS = [f"user: What is {a} + {b}?\nassistant: " for a in range(1, 6) for b in range(2, 6)]


@pytest.fixture(scope="module", params=["llama", "tied qwen3", "continued", "full", "full tied"])
def run(request, tmp_path_factory):
    """A trained policy, whose weights are far from the base model's, and the folder of its run."""
    start = request.param
    model = request.getfixturevalue("tiny_qwen3" if "tied" in start else "tiny_model")
    folder = tmp_path_factory.mktemp("run")
    settings = {"full_finetuning": True} if "full" in start else {"lora_rank": 4, "lora_alpha": 12.0}
    if start == "continued":
        config = {"use_rslora": True, "rank_pattern": {}, "alpha_pattern": {"q_proj": 3.0}}
        settings = {"adapter": str(make_adapter(model, folder / "adapter", config=config))}
    trained = module(model, **settings)
    trained.configure_model()
    if "full" not in start:
        randomise(trained.policy, scale=0.2)
    fit(folder, trained, TransformersEngine(dtype="float32"), epochs=2)
    (folder / "adapter").exists() and shutil.rmtree(folder / "adapter")
    trained.policy.model.eval()
    return trained, folder


@torch.no_grad()
def logits(model):
    return torch.cat([model(input_ids=torch.tensor([encode(p)])).logits[0] for p in PROMPTS])


def answers(model):
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    return [model.generate(input_ids=torch.tensor([encode(p)]), **settings)[0].tolist() for p in PROMPTS]


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load_with_adapter(model, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(load(model), folder).eval()


def test_the_exports_answer_as_the_policy(run, tmp_path):
    trained, folder = run
    export(folder / "last.ckpt", tmp_path / "merged", merged=True)
    merged = load(tmp_path / "merged")
    others = [merged]
    if trained.policy.has_adapter:
        export(folder / "last.ckpt", tmp_path / "adapter", merged=False)
        others.append(load_with_adapter(trained.model_name, tmp_path / "adapter"))
    expected, said = logits(trained.policy.model), answers(trained.policy.model)
    assert len(set(map(tuple, said))) > 10, "the policy must answer differently to different prompts"
    base = load(trained.model_name)
    assert (logits(base) - expected).abs().max() > 5e-3
    for model in others:
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
        assert answers(model) == said


def test_a_merged_model_is_complete(run, tmp_path):
    trained, folder = run
    export(folder / "last.ckpt", tmp_path / "merged", merged=True)
    base, merged = Path(trained.model_name), tmp_path / "merged"
    assert {p.name for p in base.iterdir()} == {p.name for p in merged.iterdir()}
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (merged / name).read_text() == (base / name).read_text(), name
    assert json.loads((merged / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    from safetensors.torch import load_file

    saved, before = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in before.items()}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained = module(tiny_model, lora_rank=4)
    trained.configure_model()
    randomise(trained.policy, scale=0.2)
    fit(folder, trained, TransformersEngine(dtype="float32"))
    return folder / "last.ckpt"


def same_files(first, second):
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in os.listdir(first))


def test_checkpoint_run_and_adapter_give_the_same(checkpoint, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    broken = tmp_path / "run" / "checkpoints" / "epoch=9.ckpt"
    shutil.copy(checkpoint, tmp_path / "run" / "checkpoints" / "epoch=1.ckpt")
    # Cut off, though written last.
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    export(checkpoint, tmp_path / "a", merged=False)
    export(tmp_path / "run", tmp_path / "b", merged=False)
    export(tmp_path / "a", tmp_path / "c", merged=False)
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "c")
    export(checkpoint, tmp_path / "d", merged=True)
    export(tmp_path / "a", tmp_path / "e", merged=True)
    assert same_files(tmp_path / "d", tmp_path / "e")


def test_an_adapter_needs_no_base_model(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["model"] = "moved/away"
    torch.save(content, tmp_path / "moved.ckpt")
    export(tmp_path / "moved.ckpt", tmp_path / "a", merged=False)
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]


TEMPLATE = "{% if shout %}!{% endif %}{% for m in messages %}[{{ m.content }}]{% endfor %}>"


class TestPrompts:
    """How the run made its prompts goes along, or is said."""

    def run(self, tmp_path, model, **settings):
        keep = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
        run = trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[keep])
        run.fit(module(model, lora_rank=4), data(FakeEngine(), **settings))
        return tmp_path / "last.ckpt"

    def test_the_template_of_a_file_is_exported_though_the_file_has_gone(self, tmp_path, tiny_model):
        from transformers import AutoTokenizer

        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        checkpoint = self.run(
            tmp_path,
            tiny_model,
            chat_template=str(tmp_path / "chat.jinja"),
            chat_template_args={"shout": True},
            system_prompt="Be brief.",
        )
        (tmp_path / "chat.jinja").unlink()
        to_give = [
            "Give the run's system prompt with each prompt: 'Be brief.'.",
            "Give the run's arguments of the chat template with each prompt: {'shout': True}.",
        ]
        assert export(checkpoint, tmp_path / "merged", merged=True) == to_give
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
        asked = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(asked, tokenize=False, shout=True) == "![hi]>"
        *notes, template = export(checkpoint, tmp_path / "adapter", merged=False)
        assert notes == to_give
        assert "An adapter's folder holds no chat template: give the run's" in template

    def test_of_plain_prompts_only_that_is_said(self, tmp_path, tiny_model):
        checkpoint = self.run(tmp_path, tiny_model, plain_prompts=True)
        notes = export(checkpoint, tmp_path / "merged", merged=True)
        assert notes == ["The run's prompts were plain text: use no chat template."]

    def test_nothing_is_said_of_the_models_own_template(self, checkpoint, tmp_path):
        assert export(checkpoint, tmp_path / "adapter", merged=False) == []

    def test_a_checkpoint_that_does_not_tell_is_exported(self, checkpoint, tmp_path):
        content = torch.load(checkpoint, weights_only=True)
        del content["grpo_lightning"]["prompts"]
        torch.save(content, tmp_path / "old.ckpt")
        assert export(tmp_path / "old.ckpt", tmp_path / "merged", merged=True) == []


@pytest.mark.parametrize(("dtype", "expected"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_merging_is_in_float32_and_saving_in_the_dtype_asked_for(tiny_model, tmp_path, dtype, expected):
    """The base's dtype by default. Rounding once gives another result than adding in bfloat16 does."""
    narrow = shutil.copytree(tiny_model, tmp_path / "bf16")
    load(tiny_model, torch.bfloat16).save_pretrained(narrow)
    adapter = make_adapter(str(narrow), tmp_path / "adapter")
    export(adapter, tmp_path / "merged", merged=True, dtype=dtype)
    exact = load_with_adapter(narrow, adapter).merge_and_unload()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == expected
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == getattr(torch, expected)
        assert torch.equal(tensor, exact.state_dict()[name].to(tensor.dtype)), name


def test_weights_that_overflow_are_refused(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", config={"lora_alpha": 1e9})
    with pytest.raises(ConfigurationError, match="weights that fit torch.float16, but some overflow"):
        export(adapter, tmp_path / "merged", merged=True, dtype="float16")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("merged", [False, True])
def test_a_target_with_content_is_refused(checkpoint, tmp_path, merged):
    (tmp_path / "mine").mkdir()
    export(checkpoint, tmp_path / "mine", merged=merged)
    before = {name: (tmp_path / "mine" / name).read_bytes() for name in os.listdir(tmp_path / "mine")}
    with pytest.raises(ConfigurationError, match="expected a new or empty folder, but .*mine exists"):
        export(checkpoint, tmp_path / "mine", merged=merged)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="expected a new or empty folder, but .*file exists"):
        export(checkpoint, tmp_path / "file", merged=merged)
    assert before == {name: (tmp_path / "mine" / name).read_bytes() for name in os.listdir(tmp_path / "mine")}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_merged_folder_is_whole_or_absent(checkpoint, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        assert not (tmp_path / "merged").exists()
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    with pytest.raises(type(error)):
        export(checkpoint, tmp_path / "merged", merged=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merged": False, "dtype": "bfloat16"}, "expected no dtype for an adapter"),
        ({"merged": True, "dtype": "int8"}, "expected a dtype among float32, bfloat16, float16, but got 'int8'"),
    ],
)
def test_bad_settings_are_refused_at_once(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        export(tmp_path / "nothing", tmp_path / "target", **settings)


def test_sources_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"neither adapter_config.json nor a whole \*.ckpt in"):
        export(tmp_path, tmp_path / "target", merged=False)
    with pytest.raises(ConfigurationError, match="but .*no.ckpt is not there"):
        export(tmp_path / "no.ckpt", tmp_path / "target", merged=False)
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name in ("junk", "other"):
        with pytest.raises(ConfigurationError, match=f"expected a checkpoint of GRPOModule, but .*{name}.ckpt is none"):
            export(tmp_path / f"{name}.ckpt", tmp_path / "target", merged=False)


def test_a_whole_model_has_no_adapter_to_export(tiny_model, tmp_path):
    fit(tmp_path, module(tiny_model, full_finetuning=True), TransformersEngine(dtype="float32"))
    with pytest.raises(ConfigurationError, match="all weights were trained: export it merged"):
        export(tmp_path / "last.ckpt", tmp_path / "target", merged=False)


def test_an_adapter_that_names_no_base_is_refused(tiny_model, tmp_path):
    folder = make_adapter(tiny_model, tmp_path / "adapter", config={"base_model_name_or_path": None})
    with pytest.raises(ConfigurationError, match="expected base_model_name_or_path in"):
        export(folder, tmp_path / "target", merged=True)

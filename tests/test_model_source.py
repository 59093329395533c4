import json
from contextlib import nullcontext

import pytest
import torch
from fakes import FakeEngine
from lightning.pytorch import Trainer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from policies import fit, make_adapter, module, relaxed

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loading import load_policy
from grpo_lightning.model_source import require_context, require_model
from grpo_lightning.tasks import SumTasks


def config_in(directory, **settings):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    return str(directory)


def test_gives_the_configuration_of_a_model(tiny_model):
    assert require_model(tiny_model).max_position_embeddings == 4096


@pytest.mark.parametrize("name", ["{0}/none", "./none", "a/b/none"])
def test_missing_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigurationError, match=f"expected a model directory, but there is none at {tmp_path}/.*none$"
    ):
        require_model(name.format(tmp_path))


@pytest.mark.parametrize("name", ["Qwen/No-Such-Model", "models/SmolLM2", "none"])
def test_name_that_is_neither_directory_nor_cached(tmp_path, monkeypatch, name):
    from huggingface_hub.constants import HF_HUB_CACHE

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError) as error:
        require_model(name)
    for part in (f"found no model '{name}'", f"no directory {tmp_path}/{name}", HF_HUB_CACHE, "HF_HUB_OFFLINE is set"):
        assert part in str(error.value)


def test_name_that_the_hub_does_not_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    with pytest.raises(ConfigurationError, match="found no model 'none'.*the hub did not give it: "):
        require_model("none")


def test_directory_without_model(tmp_path):
    with pytest.raises(ConfigurationError, match=rf"config.json in {tmp_path}, but that directory has none .*nothing"):
        require_model(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigurationError, match=r"it holds notes.txt"):
        require_model(str(tmp_path))


def test_adapter_instead_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ConfigurationError, match="it holds an adapter; give the base model"):
        require_model(str(tmp_path))


def test_broken_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        ConfigurationError, match=f"expected a model in {tmp_path}, but transformers says: .*config.json"
    ):
        require_model(str(tmp_path))


def test_architecture_that_transformers_does_not_know(tmp_path):
    with pytest.raises(ConfigurationError, match="transformers [0-9.]+ cannot load .*no_such_type"):
        require_model(config_in(tmp_path / "model", model_type="no_such_type"))


class TestContext:
    def config(self, tmp_path, **settings):
        return require_model(config_in(tmp_path / "model", model_type="llama", **settings))

    def test_names_the_numbers_and_what_fits(self, tmp_path):
        config = self.config(tmp_path, max_position_embeddings=100)
        require_context(config, 60, 40)
        with pytest.raises(ConfigurationError, match=r"<= 100, .*got 60 \+ 41 = 101; set max_tokens to at most 40, or"):
            require_context(config, 60, 41)
        with pytest.raises(ConfigurationError, match=r"got 100 \+ 1 = 101; lower max_prompt_tokens$"):
            require_context(config, 100, 1)

    def test_extended_by_rotary_scaling_is_left_to_the_engine(self, tmp_path):
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
        require_context(self.config(tmp_path, max_position_embeddings=100, rope_scaling=scaling), 300, 40)


class TestRun:
    """Before the engine starts."""

    def refused(self, tmp_path, model, **settings):
        engine = FakeEngine()
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, default_root_dir=tmp_path
        )
        with pytest.raises(ConfigurationError) as error:
            trainer.fit(GRPOModule(model), RolloutDataModule(SumTasks(5), len, engine=engine, **settings))
        assert not engine.specs
        return str(error.value)

    def test_unknown_model(self, tmp_path):
        assert "expected a model directory" in self.refused(tmp_path, str(tmp_path / "none"))

    def test_too_long_for_the_context(self, tmp_path, tiny_model):
        message = self.refused(tmp_path, tiny_model, max_prompt_tokens=4000, max_tokens=97)
        assert "4000 + 97 = 4097; set max_tokens to at most 96" in message

    def test_prompt_too_long(self, tmp_path, tiny_model):
        message = self.refused(tmp_path, tiny_model, max_prompt_tokens=20)
        assert "of 36 checked tasks this is so for 36" in message

    def test_held_out_prompt_too_long(self, tmp_path, tiny_model):
        assert "'20+20'" in self.refused(
            tmp_path, tiny_model, max_prompt_tokens=33, val_tasks=[SumTasks(20)[440]], max_tokens=8
        )

    def test_argument_that_the_template_does_not_use(self, tmp_path, tiny_model):
        message = self.refused(
            tmp_path, tiny_model, chat_template_args={"enable_thinking": False}, max_prompt_tokens=64
        )
        assert "does not use 'enable_thinking'" in message


@pytest.mark.parametrize("given", [None, {"model": "~/model", "adapter": "~/adapter"}], ids=["script", "command line"])
def test_a_tilde_is_the_home_everywhere(tmp_path, monkeypatch, tiny_model, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_model)
    make_adapter(tiny_model, tmp_path / "adapter")
    # LightningCLI lets the module keep the settings as they were given.
    settings = {**module(tiny_model).hparams, **given} if given else None
    with _given_hyperparameters_context(settings, "test") if settings else nullcontext():
        trained = module("~/model", adapter="~/adapter")
    engine = FakeEngine()
    fit(tmp_path, trained, engine, callbacks=[relaxed()])
    assert trained.hparams["model"] == engine.specs[0].model == str(tmp_path / "model")
    assert trained.policy.adapter_config()["base_model_name_or_path"] == str(tmp_path / "model")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert (saved["model"], saved["adapter"]) == (str(tmp_path / "model"), str(tmp_path / "adapter"))


def test_a_tilde_that_was_not_expanded_is_refused(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_model)
    with pytest.raises(ConfigurationError, match="expected a model directory, but there is none at .*~/model"):
        load_policy("~/model")


def test_policy_of_an_unknown_model(tmp_path):
    with pytest.raises(ConfigurationError, match=f"expected a model directory, but there is none at {tmp_path}/none"):
        load_policy(str(tmp_path / "none"))

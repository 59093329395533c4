"""The same on the real stack: vLLM and the demo model."""

import json
from dataclasses import replace

import pytest
import torch
from real import SharedVLLMEngine, fit, make_trainer
from safetensors.torch import load_file, save_file

from grpo_lightning.adapters import save_adapter
from grpo_lightning.callbacks import LoRAWeightSync, RunDoctor
from grpo_lightning.diagnostics.verdict import Status
from grpo_lightning.errors import DegeneracyError
from grpo_lightning.rollout.types import AdapterRef

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def engine():
    engine = SharedVLLMEngine(dtype="float32")
    yield engine
    engine.really_close()


def halted(engine, model, **settings):
    doctor = RunDoctor()
    trainer = make_trainer(callbacks=[doctor, *settings.pop("callbacks", [])])
    with pytest.raises(DegeneracyError) as error:
        fit(engine, model, trainer=trainer, **settings)
    assert trainer.global_step == 0
    return [v.cause for v in doctor.verdicts if v.status is Status.FAIL], str(error.value)


def shown(doctor):
    facts = doctor._engine.facts()
    print(json.dumps(facts, indent=1))
    for verdict in doctor._engine._found.verdicts:
        print(verdict.check, verdict.status, verdict.message, dict(verdict.evidence))
    return facts


def test_healthy(engine, demo_model):
    doctor = RunDoctor()
    fit(engine, demo_model, trainer=make_trainer(callbacks=[doctor]))
    facts = shown(doctor)
    assert facts["noise_floor"] < 1e-4
    assert len(facts["markers"]) == 7
    assert all(abs(m["slope"] - 1) < 1e-3 for m in facts["markers"])
    assert all(abs(c["alpha"] - 1) < 0.05 for c in facts["canary"][1:])
    assert facts["preflight_seconds"] > 0
    passed = {v.check for v in doctor._engine._found.verdicts if v.status is Status.PASS}
    assert passed == {"finite", "base agreement", "prefix cache", "marker", "adapter precision"}


def test_adapter_partly_loaded(engine, demo_model, monkeypatch):
    load = SharedVLLMEngine.load_adapter

    def partly(self, ref):
        path = ref.path / "adapter_model.safetensors"
        weights = {k: torch.zeros_like(w) if "up_proj" in k else w for k, w in load_file(path).items()}
        elsewhere = ref.path.with_name(ref.path.name + "-partly")
        elsewhere.mkdir()
        save_file(weights, elsewhere / path.name, metadata={"format": "pt"})
        (elsewhere / "adapter_config.json").write_text((ref.path / "adapter_config.json").read_text())
        load(self, replace(ref, path=elsewhere))

    monkeypatch.setattr(SharedVLLMEngine, "load_adapter", partly)
    causes, text = halted(engine, demo_model)
    assert causes == ["adapter_partial"], text
    assert "applies nothing of the adapter in up_proj" in text


class SameName(LoRAWeightSync):
    """Publishes every version under one name, id and path."""

    in_place = False

    def publish(self, module, engine):
        folder = self._root() / "adapter"
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        save_adapter(module.policy, folder)
        engine.in_place = self.in_place
        engine.load_adapter(AdapterRef(f"same-{id(self)}", id(self) % 10**6 + 1, folder, module.policy_version))


class InPlace(SameName):
    """The same, but the engine is told to load it anew; its cache knows only the name."""

    in_place = True


async def _load_again(self, ref):
    from vllm.lora.request import LoRARequest

    request = LoRARequest(lora_name=ref.name, lora_int_id=ref.id, lora_path=str(ref.path), load_inplace=self.in_place)
    await (await self._client()).add_lora(request)


@pytest.mark.parametrize(("sync", "cause"), [(SameName, "sync_noop"), (InPlace, "prefix_cache_stale")])
def test_name_id_and_path_reused(engine, demo_model, monkeypatch, sync, cause):
    monkeypatch.setattr(SharedVLLMEngine, "_load", _load_again)
    causes, text = halted(engine, demo_model, callbacks=[sync()])
    assert causes == [cause], text


def test_bfloat16(demo_model):
    engine = SharedVLLMEngine(dtype="bfloat16")
    doctor = RunDoctor()
    try:
        fit(engine, demo_model, trainer=make_trainer(callbacks=[doctor]), module={"dtype": "bfloat16"})
    finally:
        engine.really_close()
    facts = shown(doctor)
    assert 1e-3 < facts["noise_floor"] < 0.2
    assert all(abs(m["slope"] - 1) < 0.1 for m in facts["markers"])

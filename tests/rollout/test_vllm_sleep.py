"""vLLM's sleep mode between rollouts, with a client that notes what it is asked for in vLLM's place."""

import asyncio
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fakes import FakeEngine
from lightning.pytorch import Callback
from runs import MODEL, data, trainer

from grpo_lightning import GRPOModule, VLLMEngine
from grpo_lightning.errors import ConfigurationError, EngineDiedError
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.resting import rest, rests
from grpo_lightning.rollout.types import AdapterRef, SamplingSettings

SPEC = EngineSpec(model="none", lora_rank=4, max_length=96, max_concurrency=4)


class EngineDeadError(Exception):
    pass


class Client:
    """As vLLM's ``AsyncLLM``: what is asleep answers nothing."""

    def __init__(self):
        self.calls, self.sleeping, self.dead = [], set(), False

    async def _note(self, *call):
        await asyncio.sleep(0.01)
        if self.dead:
            raise EngineDeadError
        self.calls.append(call)

    async def sleep(self, level):
        await self._note("sleep", level)
        assert not self.sleeping
        self.sleeping = {"weights", "kv_cache"}

    async def wake_up(self, tags):
        await self._note("wake", *tags)
        assert self.sleeping >= set(tags), "vLLM gives up a call that names what is awake"
        self.sleeping -= set(tags)

    async def add_lora(self, request):
        assert not self.sleeping
        await self._note("adapter", request.lora_int_id)
        return True

    async def generate(self, prompt, params, request_id, lora_request):
        assert not self.sleeping
        await self._note("generate")
        logprobs = SimpleNamespace(token_ids=[5], logprobs=[-1.0])
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5], logprobs=logprobs, finish_reason="stop")])

    def shutdown(self):
        pass


class Alone(VLLMEngine):
    """Without vLLM's processes."""

    client = None

    async def _start(self, spec, processes):
        self.client = Client()
        return self.client


@pytest.fixture
def vllm(monkeypatch):
    """What the engine imports of vLLM, which takes seconds to import; gives the arguments that it is started with."""
    given = {}
    for name, content in {
        "vllm": {"SamplingParams": SimpleNamespace, "AsyncEngineArgs": dict},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=0)},
        "vllm.v1.engine.async_llm": {"AsyncLLM": SimpleNamespace(from_engine_args=given.update)},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return given


@pytest.fixture
def engine(vllm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = Alone(sleep=True)
    engine.start(SPEC)
    engine.wait_until_ready()
    yield engine
    engine.close()


WAKE = [("wake", "weights"), ("wake", "kv_cache")]


def sample(engine, count=1):
    async def several():
        await asyncio.gather(*(engine.generate([1, 2], SamplingSettings(8, 1.0)) for _ in range(count)))

    engine.run(several())


def adapter(folder, number=7):
    (folder / "adapter_config.json").write_text(json.dumps({}))
    return AdapterRef(f"a{number}", number, folder, 3)


def test_it_wakes_before_requests_once_weights_first(engine):
    sample(engine)
    engine.sleep()
    engine.sleep()
    sample(engine, count=5)
    sample(engine)
    assert engine.client.calls == [("generate",), ("sleep", 1), *WAKE, *[("generate",)] * 6]


def test_it_wakes_before_an_adapter_is_loaded_and_serves_it_after_the_next_sleep(engine, tmp_path):
    engine.sleep()
    engine.load_adapter(adapter(tmp_path))
    engine.sleep()
    sample(engine)
    assert engine.client.calls == [("sleep", 1), *WAKE, ("adapter", 7), ("sleep", 1), *WAKE, ("generate",)]
    assert engine.policy_version == 3


def test_it_wakes_when_it_must_be_ready(engine):
    engine.wait_until_ready()
    assert engine.client.calls == []
    engine.sleep()
    engine.wait_until_ready()
    engine.wait_until_ready()
    assert engine.client.calls == [("sleep", 1), *WAKE]


def test_a_restarted_engine_is_awake(engine):
    engine.sleep()
    engine.close()
    engine.start(SPEC)
    sample(engine)
    assert engine.client.calls == [("generate",)]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda engine: engine.sleep(), "before it could sleep"),
        (lambda engine: engine.wait_until_ready(), "before it woke up"),
        (lambda engine: sample(engine), "during a rollout"),
    ],
    ids=["sleep", "wait", "request"],
)
def test_an_engine_that_dies_asleep_is_named(engine, act, words):
    if words != "before it could sleep":
        engine.sleep()
    engine.client.dead = True
    with pytest.raises(EngineDiedError, match=f"process ended {words}"):
        act(engine)


@pytest.mark.parametrize(("wanted", "cuda"), [(False, True), (True, False), (False, False)])
def test_elsewhere_nothing_happens(vllm, monkeypatch, wanted, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    engine = Alone(sleep=wanted)
    engine.start(SPEC)
    engine.wait_until_ready()
    assert not rests(engine)
    rest(engine)
    engine.sleep()
    sample(engine)
    assert engine.client.calls == [("generate",)]
    engine.close()


def test_who_rests(engine):
    assert rests(engine)
    rest(engine)
    assert engine.client.calls == [("sleep", 1)]
    assert not rests(FakeEngine())
    rest(FakeEngine())


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_vllm_is_told_when_it_starts(vllm, monkeypatch, wanted, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    engine = VLLMEngine(sleep=wanted)
    engine.start(SPEC)
    engine.wait_until_ready()
    engine.close()
    assert vllm["enable_lora"]
    assert vllm.get("enable_sleep_mode", False) is (wanted and cuda)


def test_the_argument_of_vllm_is_refused():
    with pytest.raises(ConfigurationError, match=r"'enable_sleep_mode': VLLMEngine\(sleep=True\) sets it"):
        VLLMEngine(engine_args={"enable_sleep_mode": True})


class Sleeper(FakeEngine):
    """Sleeps, and answers nothing while it does."""

    sleeps = True

    def __init__(self, notes):
        super().__init__()
        self.notes, self.asleep = notes, False

    def sleep(self):
        if not self.asleep:
            self.notes.append("sleep")
        self.asleep = True

    def wait_until_ready(self):
        if self.asleep:
            self.notes.append("wake")
        self.asleep = False

    async def generate(self, *args, **settings):
        assert not self.asleep
        if self.notes[-1:] != ["sample"]:
            self.notes.append("sample")
        return await super().generate(*args, **settings)


class Steps(Callback):
    def __init__(self, notes):
        self.notes = notes

    def on_train_batch_start(self, *args):
        self.notes.append("train")


@pytest.mark.parametrize("old_logprobs", ["engine", "trainer"])
def test_a_run_trains_while_it_sleeps(tmp_path, tiny_model, old_logprobs, monkeypatch):
    notes = []
    rescore = GRPOModule.rescore
    monkeypatch.setattr(GRPOModule, "rescore", lambda *args: (notes.append("rescore"), rescore(*args))[1])
    module = GRPOModule(tiny_model, old_logprobs=old_logprobs, **MODEL)
    run = trainer(tmp_path, callbacks=[Steps(notes)], val_check_interval=1, num_sanity_val_steps=1)
    run.fit(module, data(Sleeper(notes), updates_per_rollout=2, val_size=2))
    first = ["rescore"] if old_logprobs == "trainer" else []
    epoch = ["sleep", *first, "train", "wake", "sample", "sleep", "train", "wake", "sample"]
    assert notes == ["sample", *epoch, *epoch]

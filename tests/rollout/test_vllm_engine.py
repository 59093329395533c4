"""The real vLLM engine, on tiny models: the Qwen3 class, adapters, death, interruption, orphans."""

import asyncio
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from fakes import decode, end_by, likeliest
from lightning.pytorch import Trainer

from grpo_lightning import GRPOModule, RolloutDataModule, VLLMEngine
from grpo_lightning.adapters import save_adapter
from grpo_lightning.errors import ConfigurationError, EngineDiedError, RolloutError
from grpo_lightning.loading import load_policy
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.types import AdapterRef, SamplingSettings
from grpo_lightning.tasks import SumTasks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SPEC = {"lora_rank": 4, "max_length": 96, "max_concurrency": 16}
PROMPT = list(range(10, 30))


@pytest.fixture(scope="module")
def qwen3(tiny_qwen3_for_vllm):
    return tiny_qwen3_for_vllm


def random_adapter(model, directory, seed, version):
    """An adapter with a visible effect, and the policy that it belongs to."""
    policy = load_policy(model, dtype="float32", lora_rank=4)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    path = directory / f"adapter-{seed}"
    save_adapter(policy, path)
    return AdapterRef(path.name, seed, path, version), policy


def logprobs_of(policy, prompt, tokens):
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logp = policy.model(input_ids=ids).logits[0].log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


def check_more_prompt_tokens_than_a_step_takes(engine):
    async def all_at_once():
        prompts = [[10 + number, *range(10, 87)] for number in range(16)]
        return await asyncio.gather(*(engine.generate(p, SamplingSettings(4), seed=1) for p in prompts))

    assert [len(generation.token_ids) for generation in engine.run(all_at_once())] == [4] * 16


def test_generate_score_adapters_and_death(qwen3, tmp_path):
    engine = VLLMEngine(dtype="float32", engine_args={"max_num_batched_tokens": 128})
    try:
        engine.start(EngineSpec(model=qwen3, **SPEC))
        engine.start(EngineSpec(model=qwen3, **SPEC))
        with pytest.raises(ConfigurationError, match="was started for"):
            engine.start(EngineSpec(model="other", **SPEC))
        assert engine.policy_version == -1
        sampling = SamplingSettings(max_tokens=8, temperature=0.7)
        references = {}
        for seed, version in ((1, 0), (2, 5)):
            ref, references[version] = random_adapter(qwen3, tmp_path, seed, version)
            engine.load_adapter(ref)
            assert engine.policy_version == version
            generation = engine.run(engine.generate(PROMPT, sampling, seed=3))
            assert generation.policy_version == version
            assert len(generation.token_ids) == len(generation.logprobs) == 8
            ids = torch.tensor([[*PROMPT, *generation.token_ids]])
            with torch.no_grad():
                processed = (references[version].model(input_ids=ids).logits[0] / 0.7).log_softmax(-1)
            expected = processed[len(PROMPT) - 1 : -1].gather(1, torch.tensor(generation.token_ids)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)
            scores = engine.run(engine.score([*PROMPT, *generation.token_ids]))
            torch.testing.assert_close(
                torch.tensor(scores[len(PROMPT) - 1 :]),
                logprobs_of(references[version], PROMPT, list(generation.token_ids)),
                atol=1e-4,
                rtol=0,
            )

        # The base model beside the adapter in the same step: its rows must stay untouched.
        async def both():
            return await asyncio.gather(
                engine.generate(PROMPT, SamplingSettings(6, 0.0)),
                engine.generate(PROMPT, SamplingSettings(6, 0.0), adapter=None),
                engine.generate(PROMPT, SamplingSettings(6, 1.0), seed=1, cache_salt="a"),
            )

        tuned, base, _ = engine.run(both())
        torch.testing.assert_close(
            torch.tensor(tuned.logprobs), logprobs_of(references[5], PROMPT, list(tuned.token_ids)), atol=1e-4, rtol=0
        )
        with references[5].reference():
            expected = logprobs_of(references[5], PROMPT, list(base.token_ids))
        torch.testing.assert_close(torch.tensor(base.logprobs), expected, atol=1e-4, rtol=0)
        assert base.policy_version == -1

        check_more_prompt_tokens_than_a_step_takes(engine)

        stopped = engine.run(engine.generate(PROMPT, SamplingSettings(8, 0.0, (tuned.token_ids[2],))))
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == tuned.token_ids[: tuned.token_ids.index(tuned.token_ids[2]) + 1]

        check_stop_texts_and_banned_tokens(engine, references[5])
        check_truncation(engine, references[5])

        with pytest.raises(FileNotFoundError, match="adapter_config"):
            engine.load_adapter(AdapterRef("none", 9, tmp_path / "none", 9))

        # All are found before one is killed, which takes others with it.
        for process in [p for p in engine_processes(os.getpid()) if "EngineCore" in " ".join(p.cmdline())]:
            process.kill()
        begin = time.monotonic()
        # SIGKILL leaves no last words.
        with pytest.raises(EngineDiedError, match="ended during a rollout.* It logged nothing"):
            engine.run(engine.generate(PROMPT, SamplingSettings(60)))
        assert time.monotonic() - begin < 20
    finally:
        engine.close()
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        engine.run(engine.score(PROMPT))
    assert_gone(lambda: engine_processes(os.getpid()))


def check_stop_texts_and_banned_tokens(engine, policy):
    def generate(**settings):
        return engine.run(engine.generate(PROMPT, SamplingSettings(16, 0.7, **settings), seed=3))

    free = generate()
    stops = (decode(free.token_ids)[5:8], "never comes")
    stopped = generate(stop=stops)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: end_by(stops, free.token_ids)]
    assert stopped.logprobs == pytest.approx(free.logprobs[: len(stopped.token_ids)], abs=1e-5)

    banned = tuple(sorted(set(free.token_ids[:6])))
    for temperature in (0.0, 0.7):
        params = SamplingSettings(16, temperature, banned_token_ids=banned)
        generation = engine.run(engine.generate(PROMPT, params, seed=3))
        assert not set(generation.token_ids) & set(banned)
        ids = torch.tensor([[*PROMPT, *generation.token_ids]])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1] / (temperature or 1.0)
        logits[:, list(banned)] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(generation.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def check_truncation(engine, policy):
    """What is kept is drawn alone, and the logprobs are those after truncation."""
    for top_p, top_k in ((0.6, 0), (1.0, 5), (0.8, 20)):
        params = SamplingSettings(24, 0.7, top_p=top_p, top_k=top_k)

        async def many(params=params):
            return await asyncio.gather(*(engine.generate(PROMPT, params, seed=seed) for seed in range(6)))

        for generation in engine.run(many()):
            ids = torch.tensor([[*PROMPT, *generation.token_ids]])
            with torch.no_grad():
                rows = (policy.model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1] / 0.7).double().softmax(-1)
            for row, token, s in zip(rows.tolist(), generation.token_ids, generation.logprobs, strict=True):
                kept, mass = likeliest(row, top_p, top_k)
                assert token in kept
                assert s == pytest.approx(math.log(row[token] / mass), abs=1e-4)


def test_a_failed_start_shows_the_cause_in_the_engines_own_log(qwen3, tmp_path):
    model = tmp_path / "broken"
    shutil.copytree(qwen3, model)
    os.truncate(model / "model.safetensors", 30_000)
    engine = VLLMEngine(dtype="float32")
    engine.start(EngineSpec(model=str(model), **SPEC))
    with pytest.raises(EngineDiedError) as error:
        engine.wait_until_ready()
    engine.close()
    message = str(error.value)
    assert "SafetensorError: Error while deserializing header" in message
    log = Path(message.rsplit("The whole log: ", 1)[1])
    assert "Traceback" in log.read_text()
    log.unlink()


def test_a_start_can_be_ended_at_once_and_repeated(qwen3):
    engine = VLLMEngine(dtype="float32")
    # Wherever the start is after 3 s, and when the engine's processes are there.
    for spawned in (False, True):
        engine.start(EngineSpec(model=qwen3, **SPEC))
        deadline = time.monotonic() + 60
        while spawned and not engine_processes(os.getpid()) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(3)
        begin = time.monotonic()
        engine.close()
        assert time.monotonic() - begin < 5
        assert_gone(lambda: engine_processes(os.getpid()))
    engine.start(EngineSpec(model=qwen3, **SPEC))
    engine.wait_until_ready()
    assert len(engine.run(engine.generate(PROMPT, SamplingSettings(3))).token_ids) == 3
    engine.close()
    assert_gone(lambda: engine_processes(os.getpid()))


def test_qwen3_trains_for_two_epochs(qwen3, tmp_path):
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    module = GRPOModule(qwen3, dtype="float32", lora_rank=4, learning_rate=1e-3)
    data = RolloutDataModule(
        SumTasks(5),
        lambda completion: float(completion.count("a")) + len(completion) / 10,
        engine=VLLMEngine(dtype="float32"),
        prompts_per_rollout=4,
        samples_per_prompt=4,
        updates_per_rollout=2,
        max_tokens=8,
        max_prompt_tokens=88,
        val_size=2,
    )
    trainer.fit(module, data)
    assert module.policy_version == 4
    assert float(trainer.callback_metrics["mismatch/logprob_abs_mean"]) < 1e-4
    assert float(trainer.callback_metrics["ppo/ratio_std"]) > 1e-4


SCRIPT = """
import sys
from lightning.pytorch import Trainer
from grpo_lightning import GRPOModule, RolloutDataModule, VLLMEngine
from grpo_lightning.tasks import SumTasks

class Announce(VLLMEngine):
    def load_adapter(self, ref):
        super().load_adapter(ref)
        print("sampling", flush=True)

Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False).fit(
    GRPOModule(sys.argv[1], dtype="float32", lora_rank=4),
    RolloutDataModule(SumTasks(5), lambda completion: float(len(completion)), engine=Announce(dtype="float32"),
                      prompts_per_rollout=8, samples_per_prompt=8, max_tokens=400, max_prompt_tokens=88),
)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_orphan_engine(qwen3, tmp_path, how):
    """The script has no ``__main__`` guard: the engine's processes must not run it again."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, qwen3],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "sampling" in line:
                break
        assert lines, "the script printed nothing"
        assert "sampling" in lines[-1], "".join(lines)
        children = engine_processes(process.pid)
        assert children
        time.sleep(1)
        if how is signal.SIGINT:
            # A terminal sends ctrl-C to the whole foreground group.
            os.killpg(process.pid, how)
        else:
            process.kill()
        rest, _ = process.communicate(timeout=90)
        assert process.returncode != 0
        assert_gone(lambda: [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE], rest)
        assert not list(Path("/dev/shm").glob(f"grpo-lightning-*{process.pid}*"))
    finally:
        if process.poll() is None:
            process.kill()


OTHERS = set()
"""Processes that other tests' tools left behind."""


@pytest.fixture(autouse=True)
def other_processes():
    OTHERS.clear()
    OTHERS.update(psutil.Process().children(recursive=True))


def engine_processes(pid):
    if not psutil.pid_exists(pid):
        return []
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        # A process that has ended is no such process or a zombie.
        with contextlib.suppress(psutil.NoSuchProcess):
            # Python's resource tracker belongs to the parent and ends with it.
            if child not in OTHERS and "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found


def assert_gone(alive, context=""):
    deadline = time.monotonic() + 30
    while alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(), f"{alive()}\n{context}"

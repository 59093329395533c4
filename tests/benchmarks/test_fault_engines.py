"""Engines that outlive the runs of the fault zoo, without vLLM's processes."""

from types import SimpleNamespace

import pytest

from benchmarks.faults.engines import SharedVLLMEngine
from grpo_lightning.errors import EngineDiedError
from grpo_lightning.rollout.engine import EngineSpec

pytestmark = pytest.mark.vllm

SPEC = EngineSpec(model="none", lora_rank=4, max_length=96, max_concurrency=4)


class Counted(SharedVLLMEngine):
    """Counts its starts; the first ones fail."""

    def __init__(self, failures=0):
        super().__init__()
        self.starts, self.failures = 0, failures

    async def _start(self, spec, processes):
        self.starts += 1
        if self.starts <= self.failures:
            raise RuntimeError("no memory")
        return SimpleNamespace(errored=False, shutdown=lambda: None)

    def use(self):
        self.start(SPEC)
        self.wait_until_ready()
        self.close()


def test_one_start_serves_all_runs_until_the_engine_dies():
    engine = Counted()
    engine.use()
    engine.use()
    assert engine.starts == 1
    engine._llm.result().errored = True
    engine.use()
    engine.use()
    assert engine.starts == 2
    engine.really_close()


def test_an_engine_that_did_not_start_is_started_for_the_next_run():
    engine = Counted(failures=1)
    with pytest.raises(EngineDiedError, match="no memory"):
        engine.use()
    engine.use()
    assert engine.starts == 2
    engine.really_close()

"""What `VLLMEngine` makes of vLLM's answers, without vLLM's processes."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_lightning import VLLMEngine
from grpo_lightning.errors import EngineDiedError, LogprobValidationError, RolloutError
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.types import SamplingSettings

pytestmark = pytest.mark.vllm

SPEC = EngineSpec(model="none", lora_rank=4, max_length=96, max_concurrency=4)


class Answering(VLLMEngine):
    """vLLM's answer is three tokens that end for a given reason."""

    def __init__(self, reason, said=(5, 6, 7)):
        super().__init__()
        self.reason = reason
        self.said = said

    async def _request(self, prompt_ids, params, *others):
        from vllm.logprobs import append_logprobs_for_next_position, create_sample_logprobs

        tokens = [5, 6, 7]
        logprobs = create_sample_logprobs(params.flat_logprobs)
        for token in self.said:
            append_logprobs_for_next_position(logprobs, [token], [-token / 10], [None], 1, params.logprobs)
        completion = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=self.reason)
        return SimpleNamespace(outputs=[completion])

    def answer(self):
        return asyncio.run(self.generate([1, 2], SamplingSettings(8, 1.0), adapter=None))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_completions_that_ended_are_given_with_the_reason(reason):
    generation = Answering(reason).answer()
    assert (generation.token_ids, generation.finish_reason) == ((5, 6, 7), reason)
    assert generation.logprobs == (-0.5, -0.6, -0.7)


@pytest.mark.parametrize("said", [(), (5, 6), (5, 6, 8), (5, 6, 7, 7)])
def test_logprobs_of_other_tokens_are_refused(said):
    with pytest.raises(
        LogprobValidationError, match=f"logprobs of the 3 sampled tokens, one each, but got {len(said)}"
    ):
        Answering("stop", said).answer()


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", None])
def test_completions_that_vllm_cut_off_are_refused(reason):
    with pytest.raises(RolloutError, match=f"'stop' or 'length', but vLLM ended one after 3 tokens with {reason!r}"):
        Answering(reason).answer()


class NeverThere(VLLMEngine):
    async def _start(self, spec, processes):
        processes._log.write_text("Loading weights took 7 hours.\n")
        await asyncio.sleep(60)


def test_a_start_that_takes_too_long_shows_and_keeps_the_log():
    engine = NeverThere(start_timeout=0.5)
    engine.start(SPEC)
    with pytest.raises(EngineDiedError, match="did not start within 0.5 s; raise start_timeout if") as error:
        engine.wait_until_ready()
    engine.close()
    assert "Its log ends with:\n  Loading weights took 7 hours." in str(error.value)
    log = Path(str(error.value).rsplit("The whole log: ", 1)[1])
    assert "7 hours" in log.read_text()
    log.unlink()

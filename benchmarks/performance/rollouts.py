"""Section ``rollouts``: the collector with `VLLMEngine` against calls of the same vLLM, and LoRA against none."""

import asyncio
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.performance.batches import VOCABULARY, Shape
from benchmarks.performance.growth_parts import collected, encoder
from benchmarks.performance.paired import alternate, ratio, shown, spread
from grpo_lightning import GRPOModule, VLLMEngine
from grpo_lightning.adapters import save_adapter
from grpo_lightning.demo import prepare_model
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.types import AdapterRef

SHAPES = {
    "full": {"short": Shape(16, 8, 45, 64), "long": Shape(4, 8, 1000, 64)},
    "smoke": {"short": Shape(2, 2, 45, 4)},
}
_PAIRS, _RANK = {"full": 5, "smoke": 1}, 16
SIDES = {
    "ours": "this project: collector, seeds, logprobs, ledger, LoRA",
    "logprobs": "vLLM, with logprobs and LoRA",
    "lora": "vLLM, with LoRA",
    "base": "vLLM",
}


async def _called(engine: VLLMEngine, shape: Shape, number: int, *, adapter: AdapterRef | None, logprobs: bool) -> None:
    """The same rollout by vLLM's own interface: ``n`` samples of each prompt, no seeds."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    rng, llm = np.random.default_rng(number), await engine._client()
    params = SamplingParams(
        n=shape.samples,
        max_tokens=shape.completion_tokens,
        ignore_eos=True,
        logprobs=0 if logprobs else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    request = None if adapter is None else LoRARequest(adapter.name, adapter.id, str(adapter.path))

    async def one(index: int) -> int:
        prompt = {"prompt_token_ids": rng.integers(100, VOCABULARY, shape.prompt_tokens).tolist()}
        key = f"called {number} {index} {adapter is None} {logprobs}"
        return [len(o.outputs) async for o in llm.generate(prompt, params, request_id=key, lora_request=request)][-1]

    assert sum(await asyncio.gather(*map(one, range(shape.prompts)))) == shape.prompts * shape.samples


async def prefilled(engine: VLLMEngine, shape: Shape) -> float:
    """Share of the prompt tokens of one group's requests that vLLM computed, and did not take from its cache."""
    from vllm import SamplingParams

    prompt = np.random.default_rng(99).integers(100, VOCABULARY, shape.prompt_tokens).tolist()
    params = SamplingParams(max_tokens=1, detokenize=False)
    requests = [engine._request(prompt, params, engine._current, None) for _ in range(shape.samples)]
    cached = [output.num_cached_tokens or 0 for output in await asyncio.gather(*requests)]
    return 1 - sum(cached) / (shape.samples * shape.prompt_tokens)


def measure(size: str) -> dict[str, Any]:
    """All sides in turns on one running engine, in bfloat16.

    Args:
        size: One of `SIZES`.
    """
    model, shapes = str(prepare_model()), SHAPES[size]
    engine, chat = VLLMEngine(dtype="bfloat16"), encoder(model)
    longest = max(s.prompt_tokens + s.completion_tokens for s in shapes.values())
    most = max(s.prompts * s.samples for s in shapes.values())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        module: Any = GRPOModule(model, dtype="bfloat16", lora_rank=_RANK)
        try:
            engine.start(EngineSpec(model, _RANK, longest + 64, most))
            module.configure_model()
            save_adapter(module.policy, Path(folder) / "adapter")
            adapter = AdapterRef("performance", 1, Path(folder) / "adapter", 0)
            engine.wait_until_ready()
            engine.load_adapter(adapter)
            for name, shape in shapes.items():
                counter = iter(range(10**6))

                def timed(side: str, shape: Shape = shape, counter: Any = counter) -> float:
                    number, begin = next(counter), time.perf_counter()
                    if side == "ours":
                        work = collected(engine, chat, shape, f"rollouts {number}")
                    else:
                        served = None if side == "base" else adapter
                        work = _called(engine, shape, number, adapter=served, logprobs=side == "logprobs")
                    engine.run(work)
                    return shape.sampled_tokens / (time.perf_counter() - begin)

                sides = {side: lambda side=side: timed(side) for side in SIDES}  # type: ignore[misc]
                rates = alternate(sides, _PAIRS[size], warmups=1, tell=_tell)
                share = engine.run(prefilled(engine, shape))
                found[name] = {"shape": vars(shape), "tokens_per_second": rates, "prefilled": share}
        finally:
            engine.close()
    return {"cases": found}


def _tell(name: str, number: int, result: Any) -> None:
    print(f"rollouts {name} {number}: {result:.0f} tokens/s", flush=True)


def numbers(case: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Spreads of the rates, and of the ratios that count.

    Args:
        case: One of ``cases`` of what `measure` returned.
    """
    rates = case["tokens_per_second"]
    return {
        **{side: spread(rates[side]) for side in SIDES},
        "efficiency": ratio(rates["ours"], rates["logprobs"]),
        "lora efficiency": ratio(rates["lora"], rates["base"]),
    }


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """The worse of the cases."""
    cases = [numbers(case) for case in result["cases"].values()]
    return {
        "rollout_efficiency": min(case["efficiency"]["median"] for case in cases),
        "lora_efficiency": min(case["lora efficiency"]["median"] for case in cases),
    }


def table(result: Mapping[str, Any]) -> str:
    """A row a side, then the ratios."""
    cases = {name: numbers(case) for name, case in result["cases"].items()}
    lines = [f"| tokens a second | {' | '.join(cases)} |", "|---|" + "---|" * len(cases)]
    for side, text in SIDES.items():
        lines.append(f"| {text} | {' | '.join(shown(case[side], '.0f') for case in cases.values())} |")
    for key, text in (
        ("efficiency", "this project / vLLM with logprobs and LoRA"),
        ("lora efficiency", "vLLM with LoRA / vLLM"),
    ):
        lines.append(f"| {text} | {' | '.join(shown(case[key]) for case in cases.values())} |")
    shares = [f"{case['prefilled']:.2f}" for case in result["cases"].values()]
    lines.append(f"| prompt tokens of a group that were computed, of all its requests' | {' | '.join(shares)} |")
    return "\n".join(lines)

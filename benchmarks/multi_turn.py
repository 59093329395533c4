"""What the collector costs, what a stalled episode costs the others, and how well trainer and engine agree.

Run: python benchmarks/multi_turn.py [--model FOLDER] [--pairs 5] [--json FILE]
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from grpo_lightning import VLLMEngine
from grpo_lightning.adapters import save_adapter
from grpo_lightning.demo import prepare_model
from grpo_lightning.envs import Environment, Observation, SingleTurn
from grpo_lightning.loading import load_policy
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.advantages import with_advantages
from grpo_lightning.rollout.collector import Finished, collect
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.player import Player, request_seed
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.types import Action, AdapterRef, SamplingSettings, Task
from grpo_lightning.tasks import SumTasks

PROMPTS, SAMPLES, MAX_TOKENS = 16, 8, 32
STALL_SECONDS = 30.0


class Chat(Environment):
    """Asks for more, over several turns; one episode in the middle of its life stands still.

    Args:
        stalled: Numbers of the environments, counted as they are made, that stand still once.
    """

    made = 0

    def __init__(self, stalled: frozenset[int] = frozenset()) -> None:
        self._stalls = Chat.made in stalled
        self._turns = 0
        Chat.made += 1

    async def reset(self, task: Task) -> Observation:
        """The task."""
        return Observation(task.messages)

    async def step(self, action: Action) -> Observation:
        """Three turns."""
        self._turns += 1
        if self._stalls and self._turns == 1:
            await asyncio.sleep(STALL_SECONDS)
        question = {"role": "user", "content": f"Why not {len(action.text)} instead?"}
        return Observation((question,), reward=float(len(action.text)), terminated=self._turns == 3)


def player(engine: VLLMEngine, encoder: PromptEncoder, sampling: SamplingSettings, key: str, **choices: Any) -> Player:
    """A player of the single question, or of what ``environment`` makes."""
    environment = choices.pop("environment", SingleTurn)
    scorer = Scorer([len_reward] if environment is SingleTurn else [])
    settings = EpisodeSettings(**choices)
    return Player(
        engine=engine,
        encoder=encoder,
        sampling=sampling,
        scorer=scorer,
        settings=settings,
        max_context=1000,
        environments={"": environment},
        seed_key=key,
    )


def len_reward(completion: str) -> float:
    """A reward that costs nothing."""
    return float(len(completion))


async def directly(engine: VLLMEngine, prompts: list[list[int]], sampling: SamplingSettings, key: str) -> int:
    """The same requests as the collector's, by vLLM's own client; returns the tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    client = await engine._client()
    lora = _lora(engine)

    async def one(prompt: list[int], seed: int, name: str) -> int:
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=seed,
            logprobs=0,
            stop_token_ids=list(sampling.stop_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for output in client.generate(
            {"prompt_token_ids": prompt}, params, request_id=f"{key}-{name}", lora_request=lora
        ):
            last = output
        return len(last.outputs[0].token_ids)

    counts = await asyncio.gather(
        *(one(prompt, request_seed(key, i, n), f"{i}-{n}") for i, prompt in enumerate(prompts) for n in range(SAMPLES))
    )
    return sum(counts)


def _lora(engine: VLLMEngine) -> Any:
    from grpo_lightning.rollout.vllm_messages import lora_request

    return lora_request(engine._current)


def overhead(engine: VLLMEngine, encoder: PromptEncoder, sampling: SamplingSettings, pairs: int) -> dict[str, Any]:
    """Tokens a second by the collector and by vLLM directly, in turns."""
    tasks = [SumTasks(90)[i] for i in range(PROMPTS)]
    prompts = [encoder(task) for task in tasks]
    speeds: dict[str, list[float]] = {"direct": [], "collector": []}
    for pair in range(pairs + 1):
        order = ("direct", "collector") if pair % 2 else ("collector", "direct")
        for kind in order:
            begin = time.perf_counter()
            if kind == "direct":
                tokens = engine.run(directly(engine, prompts, sampling, f"direct-{pair}"))
            else:
                groups = engine.run(
                    collect(player(engine, encoder, sampling, f"collector-{pair}"), tasks, samples_per_task=SAMPLES)
                )
                tokens = sum(int(ledger.sampled.sum()) for g in groups for e in g.episodes for ledger in e.ledgers)
            # The first pair warms up.
            if pair:
                speeds[kind].append(tokens / (time.perf_counter() - begin))
    ratios = [c / d for c, d in zip(speeds["collector"], speeds["direct"], strict=True)]
    return {
        "collector_tokens_per_second": statistics.median(speeds["collector"]),
        "direct_tokens_per_second": statistics.median(speeds["direct"]),
        "collector_ratio": statistics.median(ratios),
        "collector_ratio_spread": [min(ratios), max(ratios)],
    }


def stall(engine: VLLMEngine, encoder: PromptEncoder, sampling: SamplingSettings) -> dict[str, Any]:
    """When the others finish while one of 64 episodes stands still."""
    tasks = [SumTasks(90)[i] for i in range(8)]
    result = {}
    for name, stalled in (("without_stall", frozenset()), ("with_stall", frozenset({20}))):
        Chat.made = 0
        ends: list[float] = []
        begin = time.perf_counter()
        play = player(
            engine,
            encoder,
            sampling,
            name,
            environment=lambda stalled=stalled: Chat(stalled),
            truncated_action="step",
        )
        finished: Finished = {}
        engine.run(
            collect(
                play,
                tasks,
                samples_per_task=8,
                finished=finished,
                on_episode=lambda episode, begin=begin, ends=ends: ends.append(time.perf_counter() - begin),
            )
        )
        result[f"{name}_63_of_64_seconds"] = ends[-2]
        result[f"{name}_last_seconds"] = ends[-1]
    return result


def agreement(
    engine: VLLMEngine, encoder: PromptEncoder, sampling: SamplingSettings, model: str, policy: Any
) -> dict[str, Any]:
    """Largest difference between the trainer's logprobs and the engine's, over all turns, both in float32."""
    tasks = [SumTasks(90)[i] for i in range(8)]
    Chat.made = 0
    play = player(engine, encoder, sampling, "agreement", environment=Chat, truncated_action="step")
    groups = with_advantages(engine.run(collect(play, tasks, samples_per_task=4)))
    ((batch,),) = cut(groups, Layout(1, 1, 1, 1), lambda lengths: [1.0] * len(lengths), sampling)
    with torch.no_grad():
        logprobs, *_ = policy.token_logprobs(batch)
    difference = (logprobs - batch.old_logprobs).abs()
    return {
        "agreement_max_abs": float(difference.max()),
        "agreement_max_abs_by_turn": [float(difference[batch.turn == t].max()) for t in range(3)],
        "agreement_tokens": batch.num_targets,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model; the demo's by default")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = args.model or str(prepare_model())
    encoder = PromptEncoder(model, 256)
    sampling = SamplingSettings(MAX_TOKENS, 1.0, encoder.stop_token_ids)
    policy = load_policy(model, dtype="float32")
    for parameter in policy.trainable_parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    engine = VLLMEngine(dtype="float32")
    engine.start(EngineSpec(model, 16, 1000, PROMPTS * SAMPLES))
    try:
        engine.wait_until_ready()
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            save_adapter(policy, adapter)
            engine.load_adapter(AdapterRef("benchmark", 1, adapter, 0))
        results = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **overhead(engine, encoder, sampling, args.pairs),
            **agreement(engine, encoder, sampling, model, policy),
            **stall(engine, encoder, sampling),
        }
    finally:
        engine.close()
    text = json.dumps(results, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

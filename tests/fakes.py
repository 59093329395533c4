"""Stand-ins shared by the tests: the vocabulary of the tiny models, and an engine without a model."""

import inspect
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from grpo_lightning.errors import RolloutError
from grpo_lightning.rollout.continuation import Continuation
from grpo_lightning.rollout.engine import CURRENT, Adapter, Current, EngineSpec, require_directory
from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.packing import PackedSequence, Row
from grpo_lightning.rollout.types import Action, AdapterRef, Generation, SamplingSettings, Task

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNKNOWN)
TINY_VOCABULARY = (*SPECIAL_TOKENS, "\n", *map(chr, range(32, 127)))
"""The tiny models' tokens in the order of their ids: one character each."""
PAD_ID, EOS_ID, UNKNOWN_ID = range(3)


def encode(text: str) -> list[int]:
    """Ids of a text in the tiny vocabulary."""
    return [TINY_VOCABULARY.index(character) for character in text]


def decode(token_ids: Sequence[int]) -> str:
    """Text of ids in the tiny vocabulary, without special tokens."""
    return "".join(TINY_VOCABULARY[i] for i in token_ids if i >= len(SPECIAL_TOKENS))


def end_by(texts: Sequence[str], token_ids: Sequence[int]) -> int | None:
    """How many tokens there are when the first of the texts is complete; None if none ever is."""
    lengths = range(1, len(token_ids) + 1)
    return next((n for n in lengths if any(text in decode(token_ids[:n]) for text in texts)), None)


def random_generation(
    prompt_ids: Sequence[int], params: SamplingSettings, seed: int | None, version: int
) -> Generation:
    """Random text that depends on the seed alone (on the prompt alone if greedy), with plausible logprobs.

    About half of the completions end with the first of the stop tokens before they reach ``max_tokens``.
    """
    key = f"greedy {list(prompt_ids)}" if params.temperature == 0 else None if seed is None else f"seed {seed}"
    rng = random.Random(key)
    stops = set(params.stop_token_ids)
    excluded = {*stops, *params.banned_token_ids}
    ordinary = [i for i in range(len(SPECIAL_TOKENS), len(TINY_VOCABULARY)) if i not in excluded]
    length = rng.randint(1, 2 * params.max_tokens)
    stopped = bool(stops) and length <= params.max_tokens
    tokens = [rng.choice(ordinary) for _ in range(min(length, params.max_tokens))]
    if stopped:
        tokens[-1] = min(stops)
    logprobs = [math.log(rng.uniform(0.05, 0.95)) for _ in tokens]
    return Generation(tuple(tokens), tuple(logprobs), "stop" if stopped else "length", version)


class FakeChat:
    """What a `Player` needs of a `PromptEncoder`, on the tiny vocabulary: each message is ``<r text>``.

    Turns end with EOS; the answer begins behind ``<a ``.
    """

    stop_token_ids = (EOS_ID,)

    def first(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]:
        return encode("".join(f"<{m['role'][0]} {m['content']}>" for m in messages) + "<a ")

    def prompt(self, name: str, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]:
        return self.first(messages, tools)

    def continuation(
        self, completion_ids: Sequence[int], messages: Sequence[Any], tools: Sequence[Any] = ()
    ) -> Continuation:
        ended = bool(completion_ids) and completion_ids[-1] == EOS_ID
        return Continuation(() if ended else (EOS_ID,), tuple(encode(">") + self.first(messages)))

    def shows_tools(self, tools: Sequence[Any]) -> bool:
        return False

    def with_system_prompt(self, messages: Sequence[Any]) -> Sequence[Any]:
        return messages

    def forced(self, text: str) -> list[int]:
        return [*encode(text), EOS_ID]

    def is_extension(self, token_ids: Sequence[int], messages: Sequence[Any], tools: Sequence[Any] = ()) -> bool:
        return "<think>" not in decode(token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(token_ids)


def constant_scores(token_ids: Sequence[int], version: int) -> list[float]:
    return [-1.0] * (len(token_ids) - 1)


class FakeEngine:
    """A `RolloutEngine` without a model, on an event loop of its own, that notes what is asked of it.

    Args:
        generation: ``(prompt_ids, params, seed, version) -> Generation``, plain or async; `random_generation` if
            omitted.
        scores: ``(token_ids, version) -> list of float`` for `score`; -1 for each token if omitted.

    Attributes:
        calls: ``(policy_version, prompt_ids)`` of every `generate`, in order.
        requests: ``(prompt_ids, params, seed, adapter, cache_salt)`` of every `generate`, in order.
        scored: ``(policy_version, token_ids)`` of every `score`.
        loads: Every loaded adapter.
        specs: Every spec that `start` got.
        closed: How often `close` was called.
    """

    def __init__(
        self,
        generation: Callable[[Sequence[int], SamplingSettings, int | None, int], Any] = random_generation,
        scores: Callable[[Sequence[int], int], list[float]] = constant_scores,
    ) -> None:
        self._generation = generation
        self._scores = scores
        self._loop: EventLoopThread | None = None
        self._current: AdapterRef | None = None
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        self.requests: list[tuple[tuple[int, ...], SamplingSettings, int | None, Adapter, str | None]] = []
        self.scored: list[tuple[int, tuple[int, ...]]] = []
        self.loads: list[AdapterRef] = []
        self.specs: list[EngineSpec] = []
        self.closed = 0

    @property
    def policy_version(self) -> int:
        return -1 if self._current is None else self._current.version

    def start(self, spec: EngineSpec) -> None:
        self.specs.append(spec)
        if self._loop is None:
            self._loop = EventLoopThread("fake-engine")

    def wait_until_ready(self) -> None:
        pass

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            coroutine.close()
            raise RolloutError("the fake engine was not started, or was closed already")
        return self._loop.run(coroutine)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingSettings,
        *,
        seed: int | None = None,
        adapter: Adapter = CURRENT,
        cache_salt: str | None = None,
    ) -> Generation:
        version = self._version(adapter)
        self.calls.append((version, tuple(prompt_ids)))
        self.requests.append((tuple(prompt_ids), params, seed, adapter, cache_salt))
        result = self._generation(prompt_ids, params, seed, version)
        return await result if inspect.isawaitable(result) else result

    async def score(self, token_ids: Sequence[int], *, adapter: Adapter = CURRENT) -> list[float]:
        version = self._version(adapter)
        self.scored.append((version, tuple(token_ids)))
        return self._scores(token_ids, version)

    def load_adapter(self, ref: AdapterRef) -> None:
        require_directory(ref)
        self.loads.append(ref)
        self._current = ref

    def close(self) -> None:
        self.closed += 1
        loop, self._loop, self._current = self._loop, None, None
        if loop is not None:
            loop.close()

    def _version(self, adapter: Adapter) -> int:
        if isinstance(adapter, Current):
            return self.policy_version
        return -1 if adapter is None else adapter.version


def make_task(name: str = "task", **data: Any) -> Task:
    """A task with one user message."""
    return Task(name, ({"role": "user", "content": f"{name}?"},), data)


def make_episode(
    tokens: Sequence[int],
    reward: float | None = 1.0,
    *,
    prompt: Sequence[int] = (4, 5),
    logprobs: Sequence[float] | None = None,
    finish_reason: Any = "stop",
    version: int = 0,
    rewards: dict[str, float | None] | None = None,
) -> Episode:
    """A finished episode of one turn; its logprobs follow from its tokens unless given."""
    values = tuple(-0.1 - 0.01 * t for t in tokens) if logprobs is None else tuple(logprobs)
    action = Action("".join(map(str, tokens)), tuple(tokens), values, sum(values), False, finish_reason, version)
    return Episode(
        (Turn(({"role": "user", "content": "?"},), action),),
        (Ledger.of_prompt(prompt).extended(tokens, Source.SAMPLED, 0, values, version),),
        {"reward": reward} if rewards is None else rewards,
        reward,
        "truncated" if finish_reason == "length" else "terminated",
    )


def make_group(episodes: Sequence[Episode], advantages: Sequence[float] = (), name: str = "task") -> Group:
    """A group of finished episodes, with one advantage for each."""
    values = tuple((a,) * len(e.turns) for a, e in zip(advantages, episodes, strict=False))
    return Group(make_task(name), tuple(episodes), values)


def make_row(prompt: Sequence[int], completions: Sequence[Sequence[int]], *, weight: float = 1.0) -> Row:
    """A row of sequences of one turn, ready to be packed, with logprobs -1 and advantages 1."""
    begun = Ledger.of_prompt(prompt)
    ledgers = [begun.extended(tokens, Source.SAMPLED, 0, [-1.0] * len(tokens), 0) for tokens in completions]
    return Row(tuple(prompt), tuple(PackedSequence(ledger, 0, (1.0,), weight) for ledger in ledgers))


def likeliest(probabilities, top_p, top_k):
    """The tokens that truncated sampling keeps of one distribution, and their mass, by a loop over them."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k:
        order = order[:top_k]
    whole = math.fsum(probabilities[i] for i in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p * whole and top_p < 1:
            break
        kept.append(token)
        mass = math.fsum(probabilities[i] for i in kept)
    return set(kept), mass

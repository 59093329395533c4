"""What every rollout engine can do."""

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from grpo_lightning.rollout.types import AdapterRef, Generation, SamplingSettings

T = TypeVar("T")


class Current(Enum):
    """Type of `CURRENT`."""

    CURRENT = "the adapter that was loaded last"


CURRENT: Final = Current.CURRENT
"""Stands for the adapter that was loaded last; None stands for the base model."""

Adapter = AdapterRef | Literal[Current.CURRENT] | None


@dataclass(frozen=True)
class EngineSpec:
    """What an engine needs to know of the policy. It comes from the module, so it is said once.

    Attributes:
        model: Directory or hub name of the base model.
        lora_rank: Rank of the adapters that will be loaded; 0 if whole models are.
        max_length: Longest sequence (prompt and completion), in tokens, that will be asked for.
        max_concurrency: Most requests that will be in flight at once.
        seed: Base seed of the run.
    """

    model: str
    lora_rank: int
    max_length: int
    max_concurrency: int
    seed: int = 0


class Generates(Protocol):
    """What plays episodes needs no more of an engine than this."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingSettings,
        *,
        seed: int | None = None,
        adapter: Adapter = CURRENT,
        cache_salt: str | None = None,
    ) -> Generation:
        """Sample one completion. Requests with different ``cache_salt`` never share cached prefixes."""
        ...


@runtime_checkable
class RolloutEngine(Generates, Protocol):
    """Token ids in, token ids and logprobs out; adapters loaded at run time.

    Many `generate` calls may be in flight at once; the engine batches them. All coroutines run on the engine's
    own event loop, through `run`.
    """

    @property
    def policy_version(self) -> int:
        """Version of the weights that `CURRENT` stands for; -1 until some were loaded."""
        ...

    def start(self, spec: EngineSpec) -> None:
        """Begin starting up and return at once; errors surface at the first use. Idempotent for equal specs."""
        ...

    def wait_until_ready(self) -> None:
        """Wait until requests can be taken.

        Raises:
            EngineDiedError: If the engine did not start.
        """
        ...

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it."""
        ...

    async def score(self, token_ids: Sequence[int], *, adapter: Adapter = CURRENT) -> list[float]:
        """Log-probability (temperature 1) of each token but the first, given those before it."""
        ...

    def load_adapter(self, ref: AdapterRef) -> None:
        """Load a published adapter and make it `CURRENT`. Returns when requests would use it."""
        ...

    def close(self) -> None:
        """Stop and release everything, from any state. Idempotent."""
        ...


@runtime_checkable
class CheckedEngine(RolloutEngine, Protocol):
    """An engine that can tell before it is started what it could not serve."""

    def check(self, spec: EngineSpec) -> None:
        """Refuse what `start` would refuse; nothing is loaded.

        Raises:
            ConfigurationError: If the engine could not serve the policy.
        """
        ...


@runtime_checkable
class FullWeightsEngine(RolloutEngine, Protocol):
    """An engine that can also serve a model whose weights are all trained."""

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copy all weights of the policy into the engine's model; `CURRENT` then stands for them.

        Args:
            state: Every parameter by its name in the Hugging Face model, tied ones once.
            version: The policy version whose weights they are.
        """
        ...


@runtime_checkable
class SleepingEngine(RolloutEngine, Protocol):
    """An engine that can give its memory to the trainer between rollouts."""

    @property
    def sleeps(self) -> bool:
        """Whether it is meant to."""
        ...

    def sleep(self) -> None:
        """Give the memory back; returns when it is free. Idempotent; called when no request is in flight.

        The engine wakes by itself, with what it served, in `wait_until_ready` and before any request.
        """
        ...


def resolve(adapter: Adapter, current: AdapterRef | None) -> AdapterRef | None:
    """The adapter that a request means, given the one that was loaded last; None is the base model."""
    return current if isinstance(adapter, Current) else adapter


def require_directory(ref: AdapterRef) -> Path:
    """The adapter's directory.

    Raises:
        FileNotFoundError: If the directory holds no adapter.
    """
    if not (ref.path / "adapter_config.json").is_file():
        raise FileNotFoundError(f"expected a PEFT adapter in {ref.path}, but found no adapter_config.json there")
    return ref.path

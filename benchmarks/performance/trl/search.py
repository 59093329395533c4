"""TRL's best settings on this machine: one step each, an axis at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.performance.trl.cases import Case

GIVE_UP = 1.3
"""A step is stopped when it has taken so many times the best one's seconds."""


@dataclass(frozen=True)
class Settings:
    """How TRL runs.

    Attributes:
        dtype: Of the weights.
        autocast: Whether the training step is computed under bfloat16 autocast (TRL's ``bf16``, on by default).
        threads: Of torch.
        batch: Completions of a micro-batch (``per_device_train_batch_size``); the others are accumulated.
        checkpointing: Gradient checkpointing, TRL's default.
        continuous: transformers' continuous batching in place of ``generate``.
        preload: The allocator and OpenMP libraries that this project's engine preloads.
        compile: ``torch_compile``; the step that waits for the compiler is not counted.
    """

    dtype: str = "bfloat16"
    autocast: bool = False
    threads: int = 2
    batch: int = 16
    checkpointing: bool = False
    continuous: bool = False
    preload: bool = False
    compile: bool = False


Step = Callable[[Settings, float | None], Mapping[str, Any]]
"""Times a step with settings, for at most so many seconds; returns ``seconds`` and ``peak_gib``, or ``problem``."""


def axes(case: Case, cores: int) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """What is tried, axis by axis; each axis goes on from the best so far.

    Args:
        case: The comparison.
        cores: Of the machine.
    """
    batches = [size for size in (2, 4, 8, 16, 32, 64) if case.completions % size == 0]
    near = [{"batch": size} for size in batches if size != start(case, cores).batch][-3:]
    return [
        ("dtype", [{"autocast": True}, {"dtype": "float32"}, {"dtype": "float32", "autocast": True}]),
        ("batch", near),
        ("checkpointing", [{"checkpointing": True}]),
        ("preload", [{"preload": True}]),
        ("continuous", [{"continuous": True}]),
        ("threads", [{"threads": 1}] if cores > 1 else []),
        ("compile", [{"compile": True}]),
    ]


def start(case: Case, cores: int) -> Settings:
    """Where the search begins: about 1,500 to 4,500 tokens a micro-batch."""
    sizes = [size for size in (1, 2, 4, 16) if case.completions % size == 0]
    return Settings(threads=cores, batch=max(s for s in sizes if s <= (4 if case.prompt_tokens > 500 else 16)))


def search(case: Case, cores: int, step: Step) -> tuple[Settings, list[dict[str, Any]]]:
    """The fastest settings, and all that were tried.

    Args:
        case: The comparison.
        cores: Of the machine.
        step: Times a step.

    Raises:
        RuntimeError: If the first settings do not work.
    """
    best = start(case, cores)
    found = {**asdict(best), **step(best, None)}
    if "seconds" not in found:
        raise RuntimeError(f"TRL does not take a step with {best}: {found}")
    tried, seconds = [found], found["seconds"]
    for _, changes in axes(case, cores):
        origin = best
        for change in changes:
            settings = replace(origin, **change)
            result = {**asdict(settings), **step(settings, GIVE_UP * seconds)}
            tried.append(result)
            if result.get("seconds", float("inf")) < seconds:
                best, seconds = settings, result["seconds"]
    return best, tried

"""Where the wall time of a run goes."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

START, OTHER = "start", "other"

PHASES = {
    START: "start-up",
    "rollout": "rollouts",
    "packing": "packing",
    "sync": "sync",
    "rescore": "rescoring",
    "train": "training",
    "validation": "validation",
    "checkpoint": "checkpoints",
    "doctor": "doctor",
    OTHER: "other",
}
"""The phases of a run and what people call them. At any moment exactly one has the time, so they sum to the whole."""

TRAIN_PARTS = ("forward", "loss", "backward", "optimizer")
"""Parts of training; what they leave of it is what Lightning and its callbacks do around them in a micro-batch."""


@dataclass(eq=False)
class Span:
    """One phase from its beginning to its end.

    Attributes:
        name: The phase.
        seconds: What it has taken so far, without the phases inside it.
        profiled: Whether the profiler records it.
    """

    name: str
    seconds: float = 0.0
    profiled: bool = False


class PhaseClock:
    """Gives every moment of a run to one phase: a phase inside another stops the clock of the outer one.

    The time outside all phases is start-up until `started`, and "other" afterwards. Only the thread that called
    `begin_run` has a share of the run's time; phases of other threads overlap with it, so they are timed for whoever
    opened them and are part of no sum.

    Args:
        now: The time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.begin_run()

    def begin_run(self, profiler: Any = None) -> None:
        """Forget everything, and begin with the start-up of a run.

        Args:
            profiler: A profiler of Lightning that records each phase as ``[grpo]<phase>``.
        """
        self._profiler = profiler
        self._owner = threading.get_ident()
        self._open: dict[int, list[Span]] = {}
        self._last: dict[int, float] = {self._owner: self._now()}
        self._outside = START
        self._totals: dict[str, float] = {}
        self._epoch_begin: dict[str, float] = {}
        self._epoch_end: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a module must not copy the profiler, which may hold an open file.
        return {**self.__dict__, "_profiler": None}

    def started(self) -> None:
        """The start-up is over."""
        self._charge()
        self._outside = OTHER

    @contextmanager
    def __call__(self, name: str) -> Iterator[Span]:
        """Within this context the time is that of a phase.

        Args:
            name: One of `PHASES`, or ``train_`` and one of `TRAIN_PARTS`.
        """
        span = self._enter(name)
        with self._recorded(span):
            try:
                yield span
            finally:
                self._leave(span)

    def begin(self, name: str) -> None:
        """Begin a phase that another hook of Lightning will `end`; Lightning's profilers know it by that hook."""
        self.end(name)
        self._enter(name)

    def end(self, name: str) -> None:
        """End a phase, and what was left open inside it. Nothing happens if it is not open."""
        span = next((s for s in self._stack() if s.name == name), None)
        if span is not None:
            self._leave(span)

    def totals(self) -> dict[str, float]:
        """Seconds of each phase so far that had any; their sum is the run's wall time, also if it was resumed."""
        if threading.get_ident() == self._owner:
            self._charge()
        return dict(self._totals)

    def epoch(self) -> dict[str, float]:
        """The same since the end of the epoch before this one: with the rollout that precedes an epoch's start."""
        return {name: s - self._epoch_begin.get(name, 0.0) for name, s in self.totals().items()}

    def end_epoch(self) -> None:
        """What follows is part of the next epoch, once that begins."""
        self._epoch_end = self.totals()

    def begin_epoch(self) -> None:
        """An epoch begins, with all that came since the last one's end."""
        self._epoch_begin = self._epoch_end

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain values, for a checkpoint."""
        return {"totals": self.totals(), "epoch_begin": dict(self._epoch_begin), "epoch_end": dict(self._epoch_end)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Add what the run took before it was resumed; its time so far stays."""
        for name, seconds in state["totals"].items():
            self._totals[name] = self._totals.get(name, 0.0) + seconds
        self._epoch_begin, self._epoch_end = dict(state["epoch_begin"]), dict(state["epoch_end"])

    def _stack(self) -> list[Span]:
        return self._open.setdefault(threading.get_ident(), [])

    def _enter(self, name: str) -> Span:
        self._charge()
        stack = self._stack()
        # Lightning's profilers refuse an action inside itself, and are not made for several threads.
        own = threading.get_ident() == self._owner
        span = Span(name, profiled=own and all(s.name != name for s in stack))
        stack.append(span)
        return span

    def _leave(self, span: Span) -> None:
        self._charge()
        stack = self._stack()
        while span in stack:
            stack.pop()

    def _recorded(self, span: Span) -> Any:
        recorded = span.profiled and self._profiler is not None
        return self._profiler.profile(f"[grpo]{span.name}") if recorded else nullcontext()

    def _charge(self) -> None:
        """Give the time since the last call to the phase that had it."""
        thread, now, stack = threading.get_ident(), self._now(), self._stack()
        elapsed, self._last[thread] = now - self._last.get(thread, now), now
        if stack:
            stack[-1].seconds += elapsed
        if thread == self._owner:
            name = stack[-1].name if stack else self._outside
            self._totals[name] = self._totals.get(name, 0.0) + elapsed


def by_phase(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every phase of `PHASES`, training with its parts; they sum to the whole.

    Args:
        seconds: What `PhaseClock.totals` or `PhaseClock.epoch` gives.
    """
    whole = {phase: seconds.get(phase, 0.0) for phase in PHASES}
    whole["train"] += sum(train_parts(seconds).values())
    return whole


def train_parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every part of training.

    Args:
        seconds: What `PhaseClock.totals` or `PhaseClock.epoch` gives.
    """
    return {part: seconds.get(f"train_{part}", 0.0) for part in TRAIN_PARTS}


def time_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """The numbers of ``docs/metrics.md``.

    Args:
        seconds: What `PhaseClock.epoch` gives.
    """
    phases, parts = by_phase(seconds), train_parts(seconds)
    return {
        **{f"time/{phase}_seconds": value for phase, value in phases.items()},
        **{f"time/train_{part}_seconds": value for part, value in parts.items()},
        "time/epoch_seconds": sum(phases.values()),
    }


def train_throughput(seconds: float, input_tokens: float, trained_tokens: float) -> dict[str, float]:
    """Tokens of each kind in a second of training, under the names of ``docs/metrics.md``.

    Args:
        seconds: Of training.
        input_tokens: Tokens that went through the model, prompts once per group.
        trained_tokens: Sampled tokens with a loss weight.
    """
    seconds = max(1e-9, seconds)
    return {
        "throughput/train_tokens_per_second": input_tokens / seconds,
        "throughput/train_sampled_tokens_per_second": trained_tokens / seconds,
    }

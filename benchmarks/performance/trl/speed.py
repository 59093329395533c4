"""Section ``trl``: trained samples a second of both sides, on short prompts and on long ones that are shared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.performance.engines import engine_kind
from benchmarks.performance.paired import alternate, ratio, shown, spread
from benchmarks.performance.trl import picture
from benchmarks.performance.trl.cases import LONG, SHORT, Case, smoke
from benchmarks.performance.trl.search import Settings
from benchmarks.performance.trl.sides import asked, best_settings, ours, theirs

_PAIRS = 6
NAMES = {"trl": "TRL", "ours": "grpo-lightning"}


def measure(size: str) -> dict[str, Any]:
    """Both cases.

    Args:
        size: ``"full"`` or ``"smoke"``.
    """
    from grpo_lightning.demo import prepare_model

    model = str(prepare_model())
    cases = [SHORT, LONG] if size == "full" else [smoke(SHORT), smoke(LONG)]
    pairs = _PAIRS if size == "full" else 2
    return {"engine": engine_kind(), "cases": {case.name: compared(case, model, pairs, size) for case in cases}}


def compared(case: Case, model: str, pairs: int, size: str) -> dict[str, Any]:
    """Steps of both sides in turns, after one of each that is not counted.

    Args:
        case: The comparison.
        model: Folder of the model.
        pairs: Counted steps of each.
        size: ``"full"`` or ``"smoke"``.
    """
    searched = best_settings(case, model, size)
    spec = {**asked(case, model, pairs + 1), "torch_compile": True}
    with theirs(spec, Settings(**searched["best"])) as trl, ours(spec) as own:
        trl.ready()
        own.ready()
        turns = alternate({"trl": trl.turn, "ours": own.turn}, pairs, warmups=1, tell=_tell)
    return summary(case, turns) | {"search": searched}


def summary(case: Case, turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The numbers of a case.

    Args:
        case: The comparison.
        turns: What each side reported of each step.

    Raises:
        ValueError: If a side sampled another number of tokens than it should have.
    """
    seconds = {name: [turn["seconds"] for turn in found] for name, found in turns.items()}
    lengths = {name: [turn["tokens"] for turn in found] for name, found in turns.items()}
    if case.exact and any(length != case.tokens for found in lengths.values() for length in found):
        raise ValueError(f"expected completions of {case.tokens} tokens, but the means are {lengths}")
    return {
        "prompts": case.prompts,
        "samples": case.samples,
        "tokens": case.tokens,
        "prompt_tokens": case.prompt_tokens,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "samples_per_second": {
            name: spread([case.completions / value for value in values]) for name, values in seconds.items()
        },
        "speedup": ratio(seconds["trl"], seconds["ours"]),
        "phases": {name: phases(found) for name, found in turns.items()},
        "peak_gib": {name: round(max(turn["peak_gib"] for turn in found), 2) for name, found in turns.items()},
    }


def phases(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each phase of a step; what they leave of it is other.

    Args:
        turns: What a side reported of each step.
    """
    found = [{**turn["phases"], "other": turn["seconds"] - sum(turn["phases"].values())} for turn in turns]
    return {name: round(median(one[name] for one in found), 3) for name in found[0]}


def _tell(name: str, number: int, turn: Mapping[str, Any]) -> None:
    parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in turn["phases"].items())
    print(f"{NAMES[name]} step {number}: {turn['seconds']:.1f} s ({parts})", flush=True)


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """Median speedup of each case."""
    return {f"trl_speedup_{name}": case["speedup"]["median"] for name, case in result["cases"].items()}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: samples a second, phases, and what TRL was tried with."""
    lines = [
        "| Case | Side | Samples/s | Seconds a step | Speedup of a pair | Peak memory of the trainer |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"].values():
        prompt = f"{case['prompt_tokens']} tokens" if case["prompt_tokens"] else "about 45 tokens"
        what = f"{case['prompts']} prompts of {prompt} x {case['samples']}, {case['tokens']} sampled"
        for name, label in NAMES.items():
            speedup = shown(case["speedup"], ".1f") if name == "ours" else ""
            lines.append(
                f"| {what if name == 'trl' else ''} | {label} | {shown(case['samples_per_second'][name])} | "
                f"{shown(spread(case['seconds'][name]), '.1f')} | {speedup} | {case['peak_gib'][name]:.1f} GiB |"
            )
    counted = len(next(iter(result["cases"].values()))["seconds"]["ours"])
    lines += [
        "",
        f"Medians of {counted} steps of each side in turns, least and largest in brackets. Seconds of a step by phase, "
        "medians:",
        "",
        "| Case | Side | rollout | train | sync | doctor | other |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, case in result["cases"].items():
        for name, label in NAMES.items():
            found = case["phases"][name]
            cells = [f"{found[p]:.2f}" if p in found else "" for p in picture.PHASES]
            lines.append(f"| {title if name == 'trl' else ''} | {label} | {' | '.join(cells)} |")
    lines += ["", *_settings(result), "", "![Trained samples a second, and seconds by phase](images/performance.png)"]
    return "\n".join(lines)


def _settings(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "TRL's settings, one step each, the fastest taken (marked):",
        "",
        "| Case | dtype | bf16 autocast | threads | micro-batch | checkpointing | continuous batching | preload | "
        "compile | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for title, case in result["cases"].items():
        best = case["search"]["best"]
        for tried in case["search"]["tried"]:
            mark = "**" if best.items() <= tried.items() else ""
            took = f"{mark}{tried['seconds']:.1f}{mark}" if "seconds" in tried else tried["problem"].replace("|", "/")
            flags = [_flag(tried[name]) for name in ("checkpointing", "continuous", "preload", "compile")]
            cells = [title, tried["dtype"], _flag(tried["autocast"]), str(tried["threads"]), str(tried["batch"])]
            lines.append(f"| {' | '.join([*cells, *flags, took])} |")
    return lines


def _flag(value: bool) -> str:
    return "yes" if value else "no"


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Samples a second of both sides, and seconds by phase."""
    picture.draw_speed(result, NAMES, folder / "performance.png")

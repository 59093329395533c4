"""How time and memory grow: the training step, packing, the collector and rollouts, along each size that users set."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.performance.batches import Shape
from benchmarks.performance.engines import engine_kind, make_engine
from benchmarks.performance.growth_parts import collector_point, encoder, packing_point, rollout_point
from benchmarks.performance.growth_picture import PICTURE, draw_growth
from benchmarks.performance.growth_step import step_point
from benchmarks.performance.operations import Dimensions

AXES = {
    "samples": "samples of a prompt (G)",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens of a turn",
    "prompts": "prompts",
    "turns": "turns",
}
"""Fields of `Shape` that grow, one at a time, and what to call them."""

PARTS = {
    "step": "training step",
    "packing": "packing",
    "collector": "collector, engine answers at once",
    "rollout": "rollout with an engine",
}

TOLERANCE = 0.1
"""By how much a fitted exponent may lie above the bound: times scatter, and small sizes hide constant parts."""

Point = Callable[[Shape], dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """Where one part is measured.

    Attributes:
        base: The sizes that do not grow.
        sizes: Those that do, ascending, by axis.
        repeats: Measurements of each point.
    """

    base: Shape
    sizes: Mapping[str, tuple[int, ...]]
    repeats: int

    @classmethod
    def doubling(cls, base: Shape, points: Mapping[str, tuple[int, int]], repeats: int) -> "Plan":
        """Each axis from its first size, doubled so often that there are so many points."""
        sizes = {axis: tuple(first * 2**i for i in range(count)) for axis, (first, count) in points.items()}
        return cls(base, sizes, repeats)

    def shapes(self, axis: str) -> list[Shape]:
        """The shapes along an axis."""
        return [replace(self.base, **{axis: size}) for size in self.sizes[axis]]


def _axes(samples: int, prompt: int, completion: int, prompts: int, turns: int, points: int) -> dict[str, Any]:
    return {
        axis: (first, points) for axis, first in zip(AXES, (samples, prompt, completion, prompts, turns), strict=True)
    }


FULL = {
    "step": Plan.doubling(
        Shape(2, 4, 64, 64), {**_axes(2, 64, 16, 1, 1, 5), "turns": (1, 4), "prompt_tokens": (64, 6)}, 2
    ),
    "packing": Plan.doubling(Shape(8, 8, 256, 256), _axes(4, 64, 64, 4, 1, 6), 5),
    "collector": Plan.doubling(Shape(4, 8, 256, 128), _axes(4, 64, 64, 2, 1, 5), 3),
    "rollout": Plan.doubling(Shape(4, 4, 64, 32), {**_axes(4, 64, 16, 4, 1, 5), "prompt_tokens": (64, 6)}, 2),
}
SMOKE = {part: Plan.doubling(Shape(1, 2, 16, 4), _axes(2, 16, 4, 1, 1, 3), 1) for part in PARTS}


def measure(size: str) -> dict[str, Any]:
    """All curves.

    Args:
        size: ``"full"`` or ``"smoke"``.
    """
    from transformers import AutoConfig

    from grpo_lightning.demo import prepare_model

    plans, model = (SMOKE if size == "smoke" else FULL), str(prepare_model())
    chat, dims = encoder(model), Dimensions.of(AutoConfig.from_pretrained(model))
    parts = {
        "step": _curves(plans["step"], lambda shape: step_point(shape, plans["step"].repeats)),
        "packing": _curves(plans["packing"], lambda shape: packing_point(shape, plans["packing"].repeats)),
        "collector": _curves(
            plans["collector"], lambda shape: collector_point(shape, chat, plans["collector"].repeats)
        ),
        "rollout": _rollouts(plans["rollout"], model, chat),
    }
    for part, training in (("step", True), ("rollout", False)):
        for axis, curve in parts[part].items():
            curve["work"] = [dims.operations(shape, training=training) for shape in plans[part].shapes(axis)]
    return {
        "engine": engine_kind(),
        "bases": {part: asdict(plan.base) for part, plan in plans.items()},
        "parts": parts,
        "python": python_costs(parts, plans),
    }


def _curves(plan: Plan, point: Point) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for axis in plan.sizes:
        points = [point(shape) for shape in plan.shapes(axis)]
        found[axis] = {"sizes": list(plan.sizes[axis])}
        found[axis] |= {name: [p[name] for p in points] for name in points[0]}
        print(axis, json.dumps(found[axis]), flush=True)
    return found


def _rollouts(plan: Plan, model: str, chat: Any) -> dict[str, dict[str, list[float]]]:
    """All points with one engine, which has the adapter of a fresh policy."""
    from grpo_lightning.adapters import save_adapter
    from grpo_lightning.loading import load_policy
    from grpo_lightning.rollout.engine import EngineSpec
    from grpo_lightning.rollout.types import AdapterRef

    shapes = [shape for axis in plan.sizes for shape in plan.shapes(axis)]
    # Room for what a text of about so many tokens may have more.
    length = 64 + max(shape.prompt_tokens + 2 * shape.episode_tokens for shape in shapes)
    engine = make_engine("bfloat16")
    engine.start(EngineSpec(model, 16, length, max(shape.prompts * shape.samples for shape in shapes)))
    try:
        engine.wait_until_ready()
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            save_adapter(load_policy(model, dtype="bfloat16"), adapter)
            engine.load_adapter(AdapterRef("growth", 1, adapter, 0))
            rollout_point(engine, plan.base, chat, "warm", 1)
            return _curves(plan, lambda shape: rollout_point(engine, shape, chat, repr(shape), plan.repeats))
    finally:
        engine.close()


def python_costs(parts: Mapping[str, Any], plans: Mapping[str, Plan]) -> dict[str, float]:
    """What the first process's own Python costs, microseconds of a processor, from straight lines through the curves.

    Args:
        parts: Curves by part and axis.
        plans: Their plans.
    """
    curve, base = parts["collector"]["completion_tokens"], plans["collector"].base
    per_token, per_episode = _line(curve["sizes"], [s / (base.prompts * base.samples) for s in curve["seconds"]])
    turns = parts["collector"]["turns"]
    per_turn, _ = _line(turns["sizes"], [s / (base.prompts * base.samples) for s in turns["seconds"]])
    packed, shape = parts["packing"]["prompts"], plans["packing"].base
    per_prompt, _ = _line(packed["sizes"], packed["seconds"])
    return {
        "collector_us_per_sampled_token": 1e6 * per_token,
        "collector_us_per_episode": 1e6 * per_episode,
        "collector_us_per_further_turn": 1e6 * (per_turn - per_token * base.completion_tokens),
        "packing_us_per_token": 1e6 * per_prompt / (shape.samples * (shape.prompt_tokens + shape.completion_tokens)),
    }


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and offset by least squares of the relative errors: the largest point does not decide alone."""
    slope, offset = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    return float(slope), float(offset)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) over log(sizes) by least squares, over the larger half of the points.

    >>> round(exponent([1, 2, 4, 8], [9, 9, 48, 192]), 3)
    2.0

    Args:
        sizes: Ascending.
        values: Positive.
    """
    half = math.ceil(len(sizes) / 2)
    x, y = np.log(sizes[-half:]), np.log(values[-half:])
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def judged(curve: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Fitted exponents of a curve: ``seconds``, and where there are any ``bytes``, and ``bound``.

    ``bound`` is that of the work that cannot be avoided, at least 1.
    """
    found = {name: exponent(curve["sizes"], curve[name]) for name in ("seconds", "bytes") if name in curve}
    work = exponent(curve["sizes"], curve["work"]) if "work" in curve else 1.0
    return {**found, "bound": max(1.0, work)}


def within(exponents: Mapping[str, float]) -> bool:
    """Whether time grows no faster than the work, and memory no faster than the size."""
    time_is = exponents["seconds"] <= exponents["bound"] + TOLERANCE
    return time_is and exponents.get("bytes", 0.0) <= 1 + TOLERANCE


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """Curves that grow faster than they may, and the collector's cost."""
    curves = [judged(curve) for part in result["parts"].values() for curve in part.values()]
    return {
        "growth_curves": float(len(curves)),
        "growth_curves_beyond_bound": float(sum(not within(exponents) for exponents in curves)),
        **result["python"],
    }


def table(result: Mapping[str, Any]) -> str:
    """A row a curve."""
    lines = [
        "| what | grows with | from | to | seconds | exponent | of the work | MiB | exponent | within |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part, curves in result["parts"].items():
        for axis, curve in curves.items():
            found = judged(curve)
            memory = [f"{curve['bytes'][-1] / 2**20:.3g}", f"{found['bytes']:.2f}"] if "bytes" in curve else ["", ""]
            cells = [
                PARTS[part],
                AXES[axis],
                *(str(curve["sizes"][i]) for i in (0, -1)),
                " to ".join(f"{curve['seconds'][i]:.3g}" for i in (0, -1)),
                f"{found['seconds']:.2f}",
                f"{found['bound']:.2f}",
                *memory,
                "yes" if within(found) else "no",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    bases = "; ".join(
        f"{PARTS[part]}: {b['prompts']} prompts of {b['prompt_tokens']} tokens, {b['samples']} samples of "
        f"{b['completion_tokens']} tokens, {b['turns']} turn"
        for part, b in result["bases"].items()
    )
    python = result["python"]
    return "\n".join(
        [
            *lines,
            "",
            "Exponents are slopes in log-log over the larger half of the points, by least squares; MiB are those of "
            'the largest size. "of the work" is the exponent of the operations that cannot be avoided, attention\'s '
            f"quadratic part among them, and at least 1; a curve is within its bound up to {TOLERANCE:g}. The step's "
            "memory is the growth of the resident set of a fresh process above weights and gradients; that of packing "
            "and collector is the peak of Python's and NumPy's allocations, and their seconds are processor time. An "
            f"engine's own memory is fixed when it starts. The rollouts are of {result['engine']}; what does not grow: "
            f"{bases}.",
            "",
            f"The collector takes {python['collector_us_per_episode']:.0f} us of a processor for an episode, "
            f"{python['collector_us_per_further_turn']:.0f} us for each further turn and "
            f"{python['collector_us_per_sampled_token']:.2f} us for each sampled token; packing takes "
            f"{python['packing_us_per_token']:.2f} us for each token of a sequence.",
            "",
            f"![Time and memory along each size](images/{PICTURE})",
        ]
    )


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """The picture of the table.

    Args:
        result: What `measure` returned.
        folder: Where to.
    """
    draw_growth(
        result,
        {part: {axis: judged(c) for axis, c in curves.items()} for part, curves in result["parts"].items()},
        PARTS,
        AXES,
        folder,
    )

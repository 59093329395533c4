"""Section ``training``: the training step against the machine's matrix products, and against the plain step."""

from collections.abc import Mapping
from typing import Any

from benchmarks.performance.batches import Shape
from benchmarks.performance.machine import matmul_rates
from benchmarks.performance.operations import Dimensions
from benchmarks.performance.paired import alternate, ratio, shown, spread
from benchmarks.performance.training_step import SIDES, step_point
from grpo_lightning.demo import prepare_model

SHAPES = {
    "full": {"short": Shape(8, 8, 46, 64), "long": Shape(1, 8, 1000, 64)},
    "smoke": {"short": Shape(1, 2, 16, 8)},
}
_PAIRS, _REPEATS = {"full": 5, "smoke": 1}, {"full": 3, "smoke": 1}
_RATE = "bfloat16 [2048,2048]x[2048,2048]"


def measure(size: str) -> dict[str, Any]:
    """Steps of both sides in turns, each in a process of its own, between measurements of the matrix products.

    Args:
        size: One of `SIZES`.
    """
    from transformers import AutoConfig

    dimensions, found = Dimensions.of(AutoConfig.from_pretrained(str(prepare_model()))), {}
    for name, shape in SHAPES[size].items():
        rates: list[float] = []

        def side(kind: str, shape: Shape = shape, rates: list[float] = rates) -> dict[str, float]:
            rates.append(matmul_rates()[_RATE])
            return step_point(kind, shape, _REPEATS[size])

        points = alternate({kind: lambda kind=kind: side(kind) for kind in SIDES}, _PAIRS[size], tell=_tell)  # type: ignore[misc]
        found[name] = {
            "shape": vars(shape),
            "input_tokens": shape.input_tokens,
            "sampled_tokens": shape.sampled_tokens,
            "useful_operations": dimensions.operations(shape, training=True),
            "matmul_tflops": rates,
            **points,
        }
    return {"rate": _RATE, "cases": found}


def _tell(name: str, number: int, result: Any) -> None:
    print(f"training {name} {number}: {result['seconds']:.2f} s, {result['bytes'] / 2**20:.0f} MiB", flush=True)


def numbers(case: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Spreads of what a case says.

    Args:
        case: One of ``cases`` of what `measure` returned.

    Returns:
        ``seconds`` and ``mebibytes`` of each side, ``speedup``, ``memory`` (packed over padded), and ``share`` of the
        matmul rate that was measured just before the step.
    """
    seconds = {side: [point["seconds"] for point in case[side]] for side in SIDES}
    size = {side: [point["bytes"] / 2**20 for point in case[side]] for side in SIDES}
    # One rate before each step of either side.
    rates = case["matmul_tflops"][:: len(SIDES)]
    achieved = [case["useful_operations"] / s / 1e12 for s in seconds["packed"]]
    return {
        **{f"seconds {side}": spread(values) for side, values in seconds.items()},
        **{f"mebibytes {side}": spread(values) for side, values in size.items()},
        "speedup": ratio(seconds["padded"], seconds["packed"]),
        "memory": ratio(size["packed"], size["padded"]),
        "tflops": spread(achieved),
        "share": ratio(achieved, rates),
    }


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """The worse of the cases."""
    cases = [numbers(case) for case in result["cases"].values()]
    return {
        "train_matmul_share": min(case["share"]["median"] for case in cases),
        "peak_memory_ratio": max(case["memory"]["median"] for case in cases),
    }


def table(result: Mapping[str, Any]) -> str:
    """A row a case."""
    lines = [
        "| case | input tokens | sampled | packed, s | padded, s | padded / packed | 1e12 operations / s "
        "| of the matmul rate | packed, MiB | padded, MiB | packed / padded |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        n = numbers(case)
        cells = [
            name,
            f"{case['input_tokens']:,}",
            f"{case['sampled_tokens']:,}",
            shown(n["seconds packed"]),
            shown(n["seconds padded"]),
            shown(n["speedup"], ".1f"),
            shown(n["tflops"]),
            shown(n["share"]),
            shown(n["mebibytes packed"], ",.0f"),
            shown(n["mebibytes padded"], ",.0f"),
            shown(n["memory"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

"""Measures how fast it is: ``python -m benchmarks.performance`` measures everything, then writes tables and pictures.

Run: python -m benchmarks.performance                  everything
     python -m benchmarks.performance SECTION ...      some of it; the results of the others stay
     python -m benchmarks.performance write            tables, pictures and page from what is stored

PERFORMANCE_ENGINE=transformers with --size smoke tries what needs an engine without vLLM.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.performance import growth, overlap, paths, rollouts, start, sync, training
from benchmarks.performance.machine import machine
from benchmarks.performance.page import IMAGES, PAGE, write
from benchmarks.performance.section import SIZES, Section, of
from benchmarks.performance.stored import RESULT, SMOKE, load, merged, save
from benchmarks.performance.trl import gradients, learning, speed

SECTIONS: dict[str, Section] = {
    "trl": of(speed),
    "gradients": of(gradients),
    "learning": of(learning),
    "rollouts": of(rollouts),
    "training": of(training),
    "paths": of(paths),
    "sync": of(sync),
    "overlap": of(overlap),
    "start": of(start),
    "growth": of(growth),
}
"""All sections, in the order in which they are measured and shown."""


def run(names: Sequence[str], size: str, target: Path) -> dict[str, str]:
    """Measure sections, and store each as soon as it is there; one that fails leaves what was stored.

    Args:
        names: Sections.
        size: One of `SIZES`.
        target: The file of results.

    Returns:
        What went wrong, by section.
    """
    problems = {}
    for name in names:
        print(f"== {name} ==", flush=True)
        begin = time.monotonic()
        try:
            about = machine()
            result = SECTIONS[name].measure(size)
            entry = {"size": size, "machine": about, "seconds": round(time.monotonic() - begin, 1), "result": result}
            save(target, merged(load(target), name, entry, SECTIONS))
            print(SECTIONS[name].table(result), flush=True)
        except Exception as error:
            traceback.print_exc()
            problems[name] = f"{type(error).__name__}: {error}"
    return problems


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", metavar="SECTION", help=f"write, or some of: {', '.join(SECTIONS)}")
    parser.add_argument("--size", choices=SIZES, default="full", help="smoke only shows that it runs")
    parser.add_argument("--json", type=Path, help="where results are kept")
    args = parser.parse_args(argv)
    wrong = [name for name in args.what if name not in (*SECTIONS, "write")]
    if wrong:
        parser.error(f"expected write or sections of {', '.join(SECTIONS)}, but got {', '.join(wrong)}")
    target = args.json or (RESULT if args.size == "full" else SMOKE)
    names = [name for name in args.what if name != "write"]
    problems = run(names or ([] if args.what else list(SECTIONS)), args.size, target)
    # Results of a try-out are none of the documentation's.
    committed = target.resolve() == RESULT
    page, images = (PAGE, IMAGES) if committed else (target.with_suffix(".md"), target.parent / "images")
    if not committed:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE.read_text("utf-8"), encoding="utf-8")
    write(load(target), SECTIONS, page, images)
    if problems:
        sys.exit("\n".join(f"{name} failed: {problem}" for name, problem in problems.items()))


if __name__ == "__main__":
    main()

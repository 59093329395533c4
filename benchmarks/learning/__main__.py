"""The command line: ``python -m benchmarks.learning`` runs what is missing and writes numbers, table and picture.

``tune`` and ``run`` are parts of that, ``write`` ends it, and ``show`` makes table and picture from the numbers alone.
"""

import argparse
import json
from pathlib import Path

from benchmarks.faults.runner import quiet
from benchmarks.learning.algorithms import PRESETS
from benchmarks.learning.results import DOCUMENT, PICTURE, RESULT, collect, idle
from benchmarks.learning.runs import RUNS, run_all, second_look, tune
from benchmarks.learning.text import markdown
from benchmarks.marked import inserted


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description="How well each algorithm learns on a small task.")
    parser.add_argument("command", nargs="?", choices=("all", "tune", "run", "write", "show"), default="all")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where results are kept, to go on from there")
    parser.add_argument("--presets", type=Path, default=PRESETS, help="folder of the algorithms' presets")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="with run: only these algorithms")
    args = parser.parse_args()
    quiet()
    if args.command in ("all", "tune"):
        tune(args.runs, args.presets)
    if args.command in ("all", "run"):
        run_all(args.runs, args.presets, args.only)
    if args.command in ("all", "write"):
        runs = run_all(args.runs, args.presets)
        again = second_look(idle(runs), args.runs, args.presets)
        result = collect(tune(args.runs, args.presets), runs, again, args.presets)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.command in ("all", "write", "show"):
        show()


def show() -> None:
    """Put what ``learning.json`` says into the picture and the page."""
    from benchmarks.learning.picture import draw

    result = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(result, PICTURE)
    text = markdown(result)
    if DOCUMENT.is_file():
        DOCUMENT.write_text(inserted(DOCUMENT.read_text(encoding="utf-8"), "learning", text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""The command line of the proof."""

import argparse
import json
from pathlib import Path

from benchmarks.faults.matrix import PICTURE, RESULT, RUNS, Journal, collect, run_matrix
from benchmarks.faults.runner import code_digest, quiet


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description="Faults put in on purpose, healthy runs, and what the doctor costs.")
    parser.add_argument("--model", help="folder of a model; the demo's by default")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where results are kept, to go on from there")
    parser.add_argument("--code", help="name of the code that results belong to; a digest of it by default")
    commands = parser.add_subparsers(dest="command", required=True)
    matrix = commands.add_parser("matrix", help="run the faults and the pairs")
    matrix.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these")
    matrix.add_argument("--small", action="store_true", help="a handful of them, with transformers instead of vLLM")
    matrix.add_argument("--fresh", action="store_true", help="also what has a result")
    healthy = commands.add_parser("healthy", help="run the healthy configurations")
    healthy.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these")
    healthy.add_argument("--small", action="store_true", help="with transformers instead of vLLM")
    healthy.add_argument("--steps", type=int, default=2000, help="optimizer steps in all")
    commands.add_parser("write", help="write the JSON and the picture from the results")
    commands.add_parser("overhead", help="time epochs with and without the doctor")
    commands.add_parser("table", help="print the documentation's table of faults")
    args = parser.parse_args()
    if args.command == "table":
        from benchmarks.faults.table import table

        print(table())
        return
    from grpo_lightning.demo import prepare_model

    quiet()
    model = args.model or str(prepare_model())
    code = args.code or code_digest()
    faults = Journal(args.runs / ("small.jsonl" if getattr(args, "small", False) else "faults.jsonl"), code)
    if args.command == "matrix":
        results = run_matrix(faults, model, only=args.only, small=args.small, fresh=args.fresh)
        wrong = [result["name"] for result in results if not result["named_correctly"]]
        print(f"{len(results) - len(wrong)} of {len(results)} were named in time. {' '.join(wrong)}")
        raise SystemExit(bool(wrong))
    if args.command == "overhead":
        from benchmarks.faults.overhead import measure

        measure(model)
        return
    from benchmarks.faults.healthy import run_healthy, summary

    small = "small-" if getattr(args, "small", False) else ""
    steps = Journal(args.runs / f"{small}healthy.jsonl", code)
    if args.command == "healthy":
        run_healthy(steps, model, args.runs, only=args.only, steps=args.steps, small=args.small)
        return
    from benchmarks.faults.picture import draw

    result = collect(faults, summary(steps))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, PICTURE)
    print(f"Wrote {RESULT} and {PICTURE}")
    missed = [r["name"] for r in (*result["faults"], *result["pairs"]) if not r["named_correctly"]]
    if missed or result["false_alarms"]:
        raise SystemExit(f"{len(missed)} missed ({' '.join(missed)}), {result['false_alarms']} false alarms")


if __name__ == "__main__":
    main()

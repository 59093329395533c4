"""Computes losses, gradients and advantages with TRL's own code and with this project's, on the same tensors.

Run: python -m benchmarks.trl_losses            all of it: environment, TRL, comparison, page
     python -m benchmarks.trl_losses setup      a virtual environment with TRL
     python -m benchmarks.trl_losses compare    ask TRL, compare, write trl_losses.json and the page
     python -m benchmarks.trl_losses show       print the table
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

from benchmarks.marked import inserted

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / "build" / "trl"
RESULTS = HERE.parent / "trl_losses.json"
PAGE = ROOT / "docs" / "algorithms.md"


def setup(environment: Path) -> None:
    """Make an environment that lends this one's packages, and install TRL, and what is missing, into it alone."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pinned = [line for line in (HERE / "requirements.txt").read_text("utf-8").split("\n") if line.startswith("trl==")]
    install = [python, "-m", "pip", "install", "--quiet"]
    # A TRL that is lent may be another one.
    subprocess.run([*install, "--no-deps", "--ignore-installed", *pinned], check=True)
    subprocess.run([*install, "-r", HERE / "requirements.txt"], check=True)


def asked(environment: Path) -> dict[str, Any]:
    """What TRL computes."""
    from benchmarks.trl_losses.cases import CASES

    python = environment / "bin" / "python"
    if not python.exists():
        sys.exit(f"expected TRL in {environment}, but there is no {python}; run python -m benchmarks.trl_losses setup")
    done = subprocess.run(
        [python, "-m", "benchmarks.trl_losses.theirs"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=json.dumps([case.request() for case in CASES]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(environment: Path) -> None:
    """Ask TRL, compute the same here, and write both down."""
    from benchmarks.trl_losses.batch import Batch
    from benchmarks.trl_losses.cases import CASES
    from benchmarks.trl_losses.compare import compared
    from benchmarks.trl_losses.table import markdown

    theirs, batch = asked(environment), Batch.stored()
    cases = [compared(case, batch, theirs["found"][case.name]) for case in CASES]
    lines = ",\n".join(json.dumps(case) for case in cases)
    RESULTS.write_text(f'{{"versions": {json.dumps(theirs["versions"])},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    table = markdown(json.loads(RESULTS.read_text("utf-8")))
    if PAGE.exists():
        PAGE.write_text(inserted(PAGE.read_text("utf-8"), "trl", f"\n{table}"), encoding="utf-8")
    wrong = [case["name"] for case in cases if case["equal"] == bool(case["difference"])]
    print(f"{len(cases)} comparisons, {sum(case['equal'] for case in cases)} equal")
    if wrong:
        sys.exit(f"not as expected: {', '.join(wrong)}")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trl_losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=["all", "setup", "compare", "show"], default="all")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="TRL's virtual environment")
    args = parser.parse_args()
    if args.command == "setup" or (args.command == "all" and not (args.environment / "bin" / "python").exists()):
        setup(args.environment)
    if args.command in ("all", "compare"):
        compare(args.environment)
    if args.command == "show":
        from benchmarks.trl_losses.table import markdown

        print(markdown(json.loads(RESULTS.read_text("utf-8"))), end="")


if __name__ == "__main__":
    main()

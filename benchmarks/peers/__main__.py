"""Shows the same faulty and healthy runs to rlprobe, rl-doctor and rlwatch.

Run: python -m benchmarks.peers setup      a virtual environment for the tools, with the pinned versions
     python -m benchmarks.peers collect    make the runs again (10 to 20 minutes); goes on where it was stopped
     python -m benchmarks.peers show       ask the tools, write peers.json and the page
     python -m benchmarks.peers show RUN   print what they say of a run of your own, a folder with a metrics.csv
     python -m benchmarks.peers table      print the table
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.stored import ARCHIVE, facts_of, pack, unpack
from benchmarks.peers.table import markdown, weigh

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / "build" / "peers"
RUNS = ROOT / "runs" / "peers"
RESULTS = HERE.parent / "peers.json"
PAGE = ROOT / "docs" / "doctor-peers.md"
TABLE_BEGIN, TABLE_END = "<!-- table -->\n", "\n<!-- end of table -->"


def setup(environment: Path) -> None:
    """Install the tools in an environment of their own."""
    venv.create(environment, with_pip=True)
    command = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "-r", HERE / "requirements.txt"], check=True)


def judged(folders: list[Path], environment: Path) -> dict[str, Any]:
    """What the tools say of runs, each a folder with a ``metrics.csv``."""
    python = environment / "bin" / "python"
    if not python.exists():
        sys.exit(f"expected the tools in {environment}, but there is no {python}; run python -m benchmarks.peers setup")
    done = subprocess.run(
        [python, "-m", "benchmarks.peers.judges", *(folder.resolve() for folder in folders)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def collect(names: list[str], *, small: bool, fresh: bool) -> None:
    """Make runs; when all are there, put them into the file that is shown."""
    from benchmarks.faults.runner import quiet
    from benchmarks.peers.cases import CASES
    from benchmarks.peers.collect import SMALL, UPDATES, collect_runs

    quiet()
    if small:
        collect_runs(RUNS.with_name("peers-small"), names, updates=SMALL, fresh=fresh)
        return
    missing = collect_runs(RUNS, names, updates=UPDATES, fresh=fresh)
    if missing:
        print(f"still to be made: {', '.join(missing)}")
        return
    pack(RUNS, [case.name for case in CASES], ARCHIVE)
    print(f"Wrote {ARCHIVE}")


def said_of(archive: Path, environment: Path) -> dict[str, Any]:
    """What the tools say of packed runs, and what that is worth."""
    from benchmarks.peers.cases import CASES

    with TemporaryDirectory() as runs:
        unpack(archive, Path(runs))
        folders = [Path(runs, case.name) for case in CASES]
        notes = {folder.name: facts_of(folder)["doctor"] for folder in folders}
        result = judged(folders, environment)
    return {"versions": result["versions"], "runs": weigh(result["said"], notes, CASES)}


def show(environment: Path) -> None:
    """Ask the tools about the stored runs, and write down what they say."""
    results = said_of(ARCHIVE, environment)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    before, after = PAGE.read_text("utf-8").split(TABLE_BEGIN)[0], PAGE.read_text("utf-8").split(TABLE_END)[1]
    PAGE.write_text(f"{before}{TABLE_BEGIN}\n{markdown(results)}{TABLE_END}{after}", encoding="utf-8")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["setup", "collect", "show", "table"])
    parser.add_argument("runs", nargs="*", help="collect: names of runs; show: folders of your own runs")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="the tools' virtual environment")
    parser.add_argument("--small", action="store_true", help="collect: short runs, which are not stored, to try it")
    parser.add_argument("--fresh", action="store_true", help="collect: make also the runs that are there")
    args = parser.parse_intermixed_args()
    if args.command == "setup":
        setup(args.environment)
    elif args.command == "collect":
        collect(args.runs, small=args.small, fresh=args.fresh)
    elif args.command == "show" and args.runs:
        print(json.dumps(judged([Path(folder) for folder in args.runs], args.environment), indent=1))
    elif args.command == "show":
        show(args.environment)
    else:
        print(markdown(json.loads(RESULTS.read_text("utf-8"))), end="")


if __name__ == "__main__":
    main()

"""Computes how long an epoch takes on larger machines, prints it, and writes it into docs/scaling.md.

Run: python -m benchmarks.scaling
"""

import argparse
from pathlib import Path

from benchmarks.marked import inserted
from benchmarks.scaling.scenarios import host_costs
from benchmarks.scaling.table import markdown

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def main() -> None:
    """Print and write."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    table = markdown(*host_costs())
    print(table, end="")
    PAGE.write_text(inserted(PAGE.read_text("utf-8"), "scaling", f"\n{table}"), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Computes how long an epoch takes on larger machines, prints it, and writes it into docs/scaling.md.

Run: python -m benchmarks.scaling
"""

import argparse
from pathlib import Path

from benchmarks.scaling.scenarios import host_costs
from benchmarks.scaling.table import markdown

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
TABLE_BEGIN, TABLE_END = "<!-- scaling -->", "<!-- /scaling -->"


def inserted(page: str, table: str) -> str:
    """A page with the tables between its marks; a page without marks as it is."""
    if TABLE_BEGIN not in page or TABLE_END not in page:
        return page
    before, after = page.split(TABLE_BEGIN)[0], page.split(TABLE_END)[1]
    return f"{before}{TABLE_BEGIN}\n\n{table}\n{TABLE_END}{after}"


def main() -> None:
    """Print and write."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    table = markdown(*host_costs())
    print(table, end="")
    PAGE.write_text(inserted(PAGE.read_text("utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()

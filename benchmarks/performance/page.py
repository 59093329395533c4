"""Numbers in the documentation, and nowhere else by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.marked import inserted
from benchmarks.performance import targets
from benchmarks.performance.section import Section, draw
from benchmarks.performance.stored import ROOT, headlines

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"


def written(page: str, stored: Mapping[str, Any], sections: Mapping[str, Section]) -> str:
    """The page with all that is stored.

    Args:
        page: The page as it is.
        stored: What `stored.load` returned.
        sections: All sections.
    """
    entries = stored["sections"]
    if entries:
        page = inserted(page, "performance:targets", targets.table(headlines(entries, sections)))
    for name, section in sections.items():
        if name in entries:
            page = inserted(
                page, f"performance:{name}", f"{section.table(entries[name]['result'])}\n\n{_where(entries[name])}"
            )
    return page


def _where(entry: Mapping[str, Any]) -> str:
    """What a section was measured on."""
    machine = entry["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rates = ", ".join(f"{n} {rate:.2f}" for n, rate in machine["matmul_tflops"].items() if n != "threads")
    return (
        f"*{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']:g} GiB; Python "
        f"{machine['python']}, {versions}. Matrix products in TFLOP/s before the section ran: {rates}. "
        f"{entry['seconds'] / 60:.0f} minutes.*"
    )


def write(stored: Mapping[str, Any], sections: Mapping[str, Section], page: Path = PAGE, images: Path = IMAGES) -> None:
    """Make pictures and page from what is stored.

    Args:
        stored: What `stored.load` returned.
        sections: All sections.
        page: The page.
        images: Folder of its pictures.
    """
    for name, section in sections.items():
        if name in stored["sections"]:
            draw(section, stored["sections"][name]["result"], images)
    if page.is_file():
        page.write_text(written(page.read_text("utf-8"), stored, sections), encoding="utf-8")

"""``ls`` and ``cp``: the configurations that come with the package."""

import argparse
import difflib
import shutil
from pathlib import Path

from grpo_lightning.errors import ConfigurationError

FOLDER = Path(__file__).parent.parent / "configs"


def main(command: str, args: list[str]) -> None:
    """List the configurations, or copy one."""
    parser = argparse.ArgumentParser(f"grpo-lightning {command}")
    if command == "ls":
        parser.description = "List the configurations that come with the package."
        parser.parse_args(args)
        known = shipped()
        width = max(map(len, known))
        for name, path in known.items():
            print(f"{name:<{width}} {_first_comment(path)}")
        return
    parser.description = "Copy a configuration that comes with the package."
    parser.add_argument("name", help="its name, as 'grpo-lightning ls' shows it")
    parser.add_argument("target", nargs="?", type=Path, help="file or folder to copy it to; here by default")
    given = parser.parse_args(args)
    print(copy(given.name, given.target))


def shipped() -> dict[str, Path]:
    """The configurations by name: whole ones, then those in folders, which are layered over a whole one."""
    names = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in FOLDER.rglob("*.yaml")}
    return {name: names[name] for name in sorted(names, key=lambda name: ("/" in name, name))}


def copy(name: str, target: Path | None = None) -> Path:
    """Copy a configuration.

    Args:
        name: Its name, with its folder if it is in one, with or without ``.yaml``.
        target: File or folder; the current folder if omitted.

    Returns:
        The copy.

    Raises:
        ConfigurationError: If there is none of that name, or the target exists.
    """
    known = shipped()
    wanted = name.removesuffix(".yaml")
    if wanted not in known:
        near = [name for name in known if name.endswith(f"/{wanted}")] or difflib.get_close_matches(wanted, known, n=1)
        suggestion = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise ConfigurationError(f"there is no configuration {name!r}; {suggestion}")
    source = known[wanted]
    destination = source.name if target is None else target / source.name if target.is_dir() else target
    path = Path(destination)
    if path.exists():
        raise ConfigurationError(f"expected a new file, but {path} exists already; name another target")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    return path


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")

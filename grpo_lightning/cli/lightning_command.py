"""Lightning's commands from the shell: what can be checked or answered at once comes before Lightning's import."""

import itertools
from pathlib import Path

import yaml

from grpo_lightning.cli.guide import guide
from grpo_lightning.errors import ConfigurationError

_CONFIG_OPTIONS = ("-c", "--config")


def main(command: str, args: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``predict``."""
    if "-h" in args:
        print(guide(command))
        return
    dry_run, folder, args = split_dry_run(args)
    if dry_run and command != "fit":
        raise ConfigurationError(f"--dry-run goes with fit, not with {command}")
    check_config_files(args)
    from grpo_lightning.cli.lightning_cli import run_lightning

    if dry_run:
        run_dry(args, folder)
    else:
        run_lightning([command, *args])


def split_dry_run(args: list[str]) -> tuple[bool, Path | None, list[str]]:
    """Whether ``--dry-run`` is among the arguments, the folder given to it, and the other arguments."""
    for number, arg in enumerate(args):
        option, _, folder = arg.partition("=")
        if option == "--dry-run":
            rest = args[number + 1 :]
            if not folder and rest and not rest[0].startswith("-"):
                folder, rest = rest[0], rest[1:]
            return True, Path(folder) if folder else None, args[:number] + rest
    return False, None, args


def run_dry(args: list[str], folder: Path | None) -> None:
    """Check the settings of a fit, print what it would do, and write them out in full.

    Args:
        args: Arguments of ``fit``.
        folder: Where to write ``config.yaml``; a new folder in ``runs`` by default.
    """
    from grpo_lightning.cli.dry_run import default_folder, describe
    from grpo_lightning.cli.lightning_cli import run_lightning

    cli = run_lightning(["fit", *args], dispatch=False)
    cli.before_fit()
    print(describe(cli.model, cli.datamodule, cli.trainer, cli.planned_folder()))
    target = default_folder() if folder is None else folder
    target.mkdir(parents=True, exist_ok=True)
    cli.save_settings(target / "config.yaml")
    print(f"Settings: {target / 'config.yaml'}")


def check_config_files(args: list[str]) -> None:
    """Refuse configuration files that are missing or not YAML.

    Raises:
        ConfigurationError: Naming the file, and the line where it breaks.
    """
    for name in _config_files(args):
        # Others than local files are read by Lightning, through fsspec.
        if "://" not in name:
            _check_config_file(Path(name))


def _config_files(args: list[str]) -> list[str]:
    files = [value for option, value in itertools.pairwise(args) if option in _CONFIG_OPTIONS]
    return files + [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]


def _check_config_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigurationError(
            f"expected a configuration file, but there is none at {path}; "
            "'grpo-lightning ls' lists those that come with the package, 'grpo-lightning cp NAME' copies one"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"expected UTF-8, but {path} is not: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise ConfigurationError(f"{where}: expected YAML, but {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"expected settings by name in {path}, but got {'nothing' if content is None else type(content).__name__}"
        )

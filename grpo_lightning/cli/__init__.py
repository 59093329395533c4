"""The command line ``grpo-lightning``. Importing it loads neither torch nor Lightning."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_lightning.cli.main import main

if TYPE_CHECKING:
    from grpo_lightning.cli.lightning_cli import GRPOCLI

__all__ = ["main", "run"]


def run(args: Sequence[str]) -> "GRPOCLI":
    """Run one of Lightning's commands and give back its parts, for use from Python.

    Args:
        args: The command line without the program's name, for example ``["fit", "-c", "config.yaml"]``.

    Raises:
        ConfigurationError: If the arguments are wrong. `main` prints errors instead.
    """
    from grpo_lightning.cli.lightning_cli import run_lightning

    return run_lightning(args)

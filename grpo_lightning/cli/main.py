"""Which command is meant, and how each one ends. Heavy packages load with the command that needs them."""

import difflib
import importlib
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Sequence

from grpo_lightning.cli.errors import exit_code
from grpo_lightning.cli.guide import root_guide
from grpo_lightning.errors import ConfigurationError

COMMANDS = {
    "fit": "lightning_command",
    "validate": "lightning_command",
    "predict": "lightning_command",
    "resume": "resume",
    "reward-check": "reward_check",
    "doctor": "doctor",
    "replay": "replay",
    "export": "export",
    "trajectories": "trajectories",
    "ls": "configs",
    "cp": "configs",
}
"""Module of each command, with ``main(command, args)``."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The command line without the program's name; ``sys.argv`` if omitted.

    Returns:
        The exit code: 0, 1 if the run failed, 2 for a mistake in settings or arguments, 3 if ``doctor`` found
        warnings only, 130 after ctrl-C.
    """
    given = list(sys.argv[1:] if args is None else args)
    # As with ``python -m grpo_lightning``: one's own rewards and tasks are modules in the working folder.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    with exit_code() as code:
        _dispatch(given)
    return code.value


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(root_guide())
    elif args[0] == "--version":
        print(f"grpo-lightning {importlib.metadata.version('grpo-lightning')}")
    elif args[0] in COMMANDS:
        module = importlib.import_module(f"grpo_lightning.cli.{COMMANDS[args[0]]}")
        module.main(args[0], args[1:])
    else:
        raise ConfigurationError(_no_command(args))


def _no_command(args: list[str]) -> str:
    if not args[0].startswith("-"):
        near = difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.5)
        suggestion = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        return f"there is no command {args[0]!r}; {suggestion}"
    later = next((i for i, arg in enumerate(args) if arg in COMMANDS), None)
    if later is None:
        return f"expected a command first, but got {args[0]!r}; see grpo-lightning --help"
    ordered = shlex.join(["grpo-lightning", args[later], *args[:later], *args[later + 1 :]])
    return f"expected the command first, but got {args[0]!r}; run: {ordered}"

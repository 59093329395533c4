"""What a user sees of an error: one message on stderr and an exit code that says whose fault it was."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from grpo_lightning.errors import ConfigurationError, GRPOError

TRACEBACK_ENV = "GRPO_LIGHTNING_TRACEBACK"
"""Environment variable that, set to 1, shows where an error came from."""

RUN_FAILED, WRONG_SETTINGS, INTERRUPTED = 1, 2, 130


@dataclass
class ExitCode:
    """Filled in when the command has ended."""

    value: int = 0


@contextlib.contextmanager
def exit_code() -> Iterator[ExitCode]:
    """Turn the errors that a user can act on into a message and an exit code; others keep their traceback."""
    code = ExitCode()
    try:
        yield code
    except SystemExit as stop:
        code.value = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (GRPOError, OSError, KeyboardInterrupt, _lightning_mistake()) as error:
        if os.environ.get(TRACEBACK_ENV) == "1":
            raise
        code.value = _code(error)
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
        print(message, file=sys.stderr)


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    run_failed = isinstance(error, OSError) or (
        isinstance(error, GRPOError) and not isinstance(error, ConfigurationError)
    )
    return RUN_FAILED if run_failed else WRONG_SETTINGS


def _lightning_mistake() -> type[Exception]:
    # Evaluated when an error is on its way: only then Lightning may be there to have raised it.
    module = sys.modules.get("lightning.fabric.utilities.exceptions")
    return getattr(module, "MisconfigurationException", ConfigurationError)


def root_error(error: BaseException) -> BaseException:
    """The error of this package that another one was raised from, else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GRPOError):
            return cause
        cause = cause.__cause__
    return error

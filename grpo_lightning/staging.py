"""Files and directories that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from grpo_lightning.errors import WriteError


@contextlib.contextmanager
def staged(directory: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory beside ``directory`` to write to; it takes that name when the block ends without an error.

    Args:
        directory: The final name. May exist only as an empty directory, unless ``replace``; parents are made.
        replace: Discard the directory that is there. Killed at that moment, the process leaves neither.

    Raises:
        WriteError: If something is there already, or there is no space.
    """
    staging = _beside(directory)
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in staging.glob("*"):
            if path.is_file():
                sync_to_disk(path)
        sync_to_disk(staging)
        if replace and directory.is_dir():
            discard(directory)
        os.rename(staging, directory)
        sync_to_disk(directory.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(directory, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to; it takes that name when the block ends without an error.

    Args:
        path: The final name, in a folder that exists; what is there is replaced.

    Raises:
        WriteError: If there is no space.
    """
    staging = _beside(path)
    try:
        yield staging
        sync_to_disk(staging)
        os.replace(staging, path)
        sync_to_disk(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        staging.unlink(missing_ok=True)


def discard(directory: Path) -> None:
    """Delete a directory so that it is never seen in parts under its name."""
    hidden = _beside(directory)
    os.rename(directory, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def sync_to_disk(path: Path) -> None:
    """Have the operating system write a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(target: Path, error: Exception) -> WriteError:
    """The error of a failed write, with the space that was left."""
    folder = next(p for p in (target, *target.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    return WriteError(
        f"could not write {target}: {error}. {free / 2**20:.0f} MiB are free there. Nothing partial was left and "
        "what was there before is untouched: make space, or write elsewhere, and resume"
    )

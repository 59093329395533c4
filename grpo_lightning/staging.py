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
def staged(directory: Path) -> Iterator[Path]:
    """A new directory beside ``directory`` to write to; it takes that name when the block ends without an error.

    Args:
        directory: The final name. May exist only as an empty directory; parents are made.

    Raises:
        WriteError: If something is there already, or there is no space.
    """
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in staging.glob("*"):
            if path.is_file():
                sync_to_disk(path)
        sync_to_disk(staging)
        os.rename(staging, directory)
        sync_to_disk(directory.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(directory, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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

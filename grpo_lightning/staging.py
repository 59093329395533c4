"""Directories that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A new directory beside ``directory`` to write to; it takes that name when the block ends without an error.

    Args:
        directory: The final name. May exist only as an empty directory; parents are made.

    Raises:
        OSError: If something is there already.
    """
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    staging.mkdir(parents=True)
    try:
        yield staging
        _sync(staging)
        os.rename(staging, directory)
        _sync(directory.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _sync(directory: Path) -> None:
    """Have the disk hold the directory and the files in it."""
    for path in (*directory.glob("*"), directory):
        if path.is_dir() and path != directory:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

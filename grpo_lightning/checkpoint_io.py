"""Checkpoints that are whole or absent."""

import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO

from grpo_lightning.errors import CheckpointError
from grpo_lightning.staging import sync_to_disk, write_error


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's own checkpoint format, written so that a file under its final name is complete.

    Lightning stages in the temporary directory and moves: across devices a partial file can be seen under the final
    name, and a power cut can leave one. This writes beside the destination, syncs to the disk, verifies the archive's
    checksums and renames. Paths on other file systems (``s3://...``) are left to Lightning.

    Args:
        timed: Makes the context in which checkpoints are written.
    """

    def __init__(self, timed: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self._timed = timed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            WriteError: If there is no space for it, or what was written cannot be read back.
        """
        with self._timed():
            self._save(checkpoint, path, storage_options)

    def _save(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None) -> None:
        system, plain = url_to_fs(str(path))
        if not isinstance(system, LocalFileSystem) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(plain)
        # One fixed name: what a killed process left behind is overwritten by the next save.
        staging = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with staging.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            _verify(staging)
            os.replace(staging, target)
        except (OSError, zipfile.BadZipFile) as error:
            raise write_error(target, error) from error
        except RuntimeError as error:
            # torch.save's writer turns what the file raised into one; other such errors are not about the disk.
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise write_error(target, error) from error
        finally:
            staging.unlink(missing_ok=True)
        sync_to_disk(target.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: If the file is not a whole checkpoint.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except FileNotFoundError as error:
            raise CheckpointError(f"expected a checkpoint at {path}, but there is no such file") from error
        except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it is broken, or holds more than plain values and tensors "
                f"({reason})"
            ) from error


def _verify(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise OSError(f"what was written cannot be read back ({broken})")

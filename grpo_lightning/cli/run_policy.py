"""The policy of a run as one of its checkpoints holds it, without Trainer, data or engine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning import Fabric

from grpo_lightning.checkpoint_io import DurableCheckpointIO
from grpo_lightning.cli.errors import root_error
from grpo_lightning.errors import ConfigurationError, GRPOError
from grpo_lightning.module import GRPOModule


@contextlib.contextmanager
def run_policy(settings_file: Path, checkpoint: Path) -> Iterator[GRPOModule]:
    """A run's module with a checkpoint's weights, on one device, in the dtypes and the precision of the run.

    Args:
        settings_file: The run's settings, as its folder holds them.
        checkpoint: A checkpoint of that run.

    Raises:
        ConfigurationError: If settings or checkpoint do not describe a `GRPOModule`, or do not fit each other.
    """
    settings = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
    trainer = settings.get("trainer") or {}
    fabric = Fabric(
        accelerator=trainer.get("accelerator") or "auto", devices=1, precision=trainer.get("precision") or "32-true"
    )
    module = _module(settings_file, settings.get("model"))
    module.configure_model()
    saved = DurableCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"], strict=False)
    module.eval()
    fabric.setup_module(module)
    with fabric.autocast():
        yield module


def _module(settings_file: Path, settings: Any) -> GRPOModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GRPOModule, "model")
    try:
        module = parser.instantiate_classes(parser.parse_object({"model": settings})).model
    except Exception as error:
        root = root_error(error)
        if isinstance(root, GRPOError):
            raise root from None
        raise ConfigurationError(f"expected settings of a GRPOModule in {settings_file}, but: {error}") from error
    assert isinstance(module, GRPOModule)
    return module

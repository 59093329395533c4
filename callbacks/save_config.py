"""The settings of a run of the command line, beside what the run produces."""

import json

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from grpo_lightning.callbacks.run_directory import new_file, run_directory
from grpo_lightning.redact import redact


class SaveConfig(SaveConfigCallback):
    """Saves the settings as ``config.yaml`` in the run's folder, without secrets.

    A run that is continued in its folder adds ``config-1.yaml`` and so on: nothing is overwritten.

    Args:
        parser: The parser of the command.
        config: Its settings.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, before the model is loaded. All ranks must agree on the folder first."""
        run_directory(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file (on the first rank)."""
        path = new_file(run_directory(trainer), "config.yaml")
        path.write_text(settings_text(self.parser, self.config), encoding="utf-8")


def settings_text(parser: LightningArgumentParser, config: Namespace) -> str:
    """All settings as YAML, without secrets.

    Args:
        parser: The parser of the command.
        config: Its settings.
    """
    # By way of JSON: its numbers and text are read back as what they are, whatever YAML makes of 1e-4.
    settings = redact(json.loads(parser.dump(config, skip_none=False, format="json")))
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)

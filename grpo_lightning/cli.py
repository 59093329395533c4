"""The command line: a LightningCLI with the defaults that rollouts need."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from grpo_lightning.callbacks.save_config import SaveConfig
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.module import GRPOModule

TRAINER_DEFAULTS = {
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "max_epochs": 15,
}
"""Every epoch is a rollout; runs are short in steps, so each is logged."""


class GRPOCLI(LightningCLI):
    """`LightningCLI` with ``fit`` and ``validate``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are commands, with the arguments that are not options."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for initialisation, task order and sampling."""
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Loggers that write to the same place write to the same folder of it, so that a run has one folder."""
        trainer = super().instantiate_trainer(**kwargs)
        files = [logger for logger in trainer.loggers if isinstance(logger, (CSVLogger, TensorBoardLogger))]
        for logger in files[1:]:
            if logger.root_dir == files[0].root_dir and logger._version is None:
                logger._version = files[0].version
        return trainer


def _seed(seed_everything: bool | int) -> int:
    return 0 if isinstance(seed_everything, bool) else seed_everything


def run(args: Sequence[str] | None = None) -> GRPOCLI:
    """Parse arguments and run the command.

    Args:
        args: The command line without the program's name.
    """
    return GRPOCLI(
        GRPOModule,
        RolloutDataModule,
        subclass_mode_model=False,
        subclass_mode_data=False,
        save_config_callback=SaveConfig,
        trainer_defaults=TRAINER_DEFAULTS,
        args=list(args) if args is not None else None,
        parser_kwargs={"prog": "grpo-lightning"},
    )

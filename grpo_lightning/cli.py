"""The command line: a LightningCLI with the defaults that rollouts need."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

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
        trainer_defaults=TRAINER_DEFAULTS,
        args=list(args) if args is not None else None,
        parser_kwargs={"prog": "grpo-lightning"},
    )

"""A LightningCLI with the defaults that rollouts need, settings of one's own classes, and readable errors."""

import pkgutil
import shlex
from argparse import ArgumentError
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from grpo_lightning.callbacks.run_directory import FOLDER_LOGGERS, run_directory
from grpo_lightning.callbacks.save_config import SaveConfig, settings_text
from grpo_lightning.cli.errors import root_error
from grpo_lightning.cli.explain import explain
from grpo_lightning.cli.resumed_run import go_on_in
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.errors import ConfigurationError, GRPOError
from grpo_lightning.module import GRPOModule
from grpo_lightning.redact import REDACTED, redacted_keys

TRAINER_DEFAULTS = {
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "max_epochs": 15,
}
"""Every epoch is a rollout; runs are short in steps, so each is logged."""

MODEL, DATA = "grpo_lightning.GRPOModule", "grpo_lightning.RolloutDataModule"


class SaveTrainingConfig(SaveConfig):
    """`SaveConfig` that leaves a run's folder as it is when the run is only evaluated."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, unless a command that does not train finds a run's settings."""
        if stage == "fit" or not (run_directory(trainer) / "config.yaml").exists():
            super().save_config(trainer, pl_module, stage)


class SaveResumedConfig(SaveConfig):
    """`SaveConfig` that waits until training goes on: settings with which it cannot are not those of the next time."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save nothing yet. All ranks must agree on the folder first."""
        run_directory(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        super().setup(trainer, pl_module, "fit")


class GRPOCLI(LightningCLI):
    """`LightningCLI` with ``fit``, ``validate`` and ``predict``.

    ``model`` and ``data`` take settings as they are (``model: {learning_rate: 1e-4}``), or a subclass with its own
    (``model: {class_path: my_package.MyModule, init_args: {...}}``).

    Args:
        resumed_run: Folder of the run to continue; None starts a new one.
        dispatch: Whether to run the command; else its parts are made and nothing more.
        **settings: Arguments of `LightningCLI`.
    """

    def __init__(self, *, resumed_run: Path | None = None, dispatch: bool = True, **settings: Any) -> None:
        self._resumed_run = resumed_run
        self._dispatch = dispatch
        super().__init__(GRPOModule, RolloutDataModule, **settings)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are commands, with the arguments that are not options."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate", "predict")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises where the standard one prints every option and exits."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our classes by default; one seed for initialisation, task order and sampling."""
        if self.subclass_mode_model:
            parser.set_defaults({"model": {"class_path": MODEL}, "data": {"class_path": DATA}})
        seed = "data.init_args.seed" if self.subclass_mode_data else "data.seed"
        parser.link_arguments("seed_everything", seed, compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and say what is wrong.

        Raises:
            ConfigurationError: If a setting is unknown, missing or of the wrong type, or a secret that was left out
                when the settings were saved.
        """
        assert isinstance(args, list)
        try:
            # Not through LightningCLI, which warns that there is a command line too.
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ConfigurationError(explain(str(error), self._known_keys(), settings_of)) from error
        _refuse_redacted(self.config[self.config.subcommand].as_dict())

    def _known_keys(self) -> set[str]:
        keys = {action.dest for parser in self._subcommand_parsers.values() for action in parser._actions}
        for name, class_path in (("model", MODEL), ("data", DATA)):
            keys |= {f"{name}.{setting}" for setting in settings_of(class_path)}
        return keys

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would put the checkpoint's settings in place of those that were given now.
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and "://" not in path and path not in ("best", "last", "hpc") and not Path(path).exists():
            raise ConfigurationError(f"expected a checkpoint at ckpt_path, but there is none at {path}")

    def instantiate_classes(self) -> None:
        """Make module, data module and Trainer.

        Raises:
            GRPOError: What a constructor refused, without the parser's report around it.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            root = root_error(error)
            if isinstance(root, GRPOError):
                raise root from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Loggers that write to the same place write to the same folder of it, so that a run has one folder.

        Raises:
            ConfigurationError: If a resumed run's loggers cannot go on in its folder.
        """
        trainer = super().instantiate_trainer(**kwargs)
        if self._resumed_run is not None:
            go_on_in(trainer, self._resumed_run)
            return trainer
        files = [logger for logger in trainer.loggers if isinstance(logger, FOLDER_LOGGERS)]
        for logger in files:
            if logger.root_dir == files[0].root_dir and logger._version is None:
                logger._version = files[0].version
        return trainer

    def before_fit(self) -> None:
        """Refuse to write into another run's folder.

        Raises:
            ConfigurationError: If there is a run already.
        """
        folder = self.planned_folder()
        if self._resumed_run is None and folder is not None and (folder / "config.yaml").exists():
            raise ConfigurationError(
                f"expected a new folder for this run, but {folder} already holds one; give the logger another version "
                f"or name, or continue that run: grpo-lightning resume {shlex.quote(str(folder))}"
            )

    def planned_folder(self) -> Path | None:
        """Where the run will keep its files; None where the logger decides when it starts."""
        # Not `run_directory`, which all ranks must ask together, after they were launched.
        logger = self.trainer.logger
        return Path(logger.log_dir) if isinstance(logger, FOLDER_LOGGERS) else None

    def save_settings(self, path: Path) -> None:
        """Write every setting of the command.

        Raises:
            ConfigurationError: If the file exists.
        """
        if path.exists():
            raise ConfigurationError(f"expected a new file for the settings, but {path} exists already")
        command = str(self.subcommand)
        path.write_text(settings_text(self._parser(command), self.config[command]), encoding="utf-8")

    def _run_subcommand(self, subcommand: str) -> None:
        if not self._dispatch:
            return
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            # Lightning ends the process with code 1 after ctrl-C.
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise


def run_lightning(args: Sequence[str], *, resumed_run: Path | None = None, dispatch: bool = True) -> GRPOCLI:
    """Parse arguments and run the command.

    Args:
        args: The command line without the program's name.
        resumed_run: Folder of the run that ``fit`` continues.
        dispatch: Whether to run the command; else module, data module and Trainer are made and nothing more.

    Raises:
        ConfigurationError: If the arguments are wrong.
    """
    # Only with fixed classes does the parser's help list their settings.
    subclasses = "--help" not in args
    return GRPOCLI(
        resumed_run=resumed_run,
        dispatch=dispatch,
        subclass_mode_model=subclasses,
        subclass_mode_data=subclasses,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        save_config_callback=SaveTrainingConfig if resumed_run is None else SaveResumedConfig,
        args=list(args),
        parser_kwargs={"prog": "grpo-lightning"},
    )


def settings_of(class_path: str) -> Collection[str]:
    """Names of a class's settings, those it passes on to its bases included."""
    names: list[str] = ArgumentParser().add_class_arguments(pkgutil.resolve_name(class_path), fail_untyped=False)
    return names


def _refuse_redacted(settings: dict[str, Any]) -> None:
    keys = list(redacted_keys(settings))
    if not keys:
        return
    # The command line reaches into lists only by their last item.
    ways = [
        f"edit {key} in a copy of the configuration file" if "[" in key else f"add --{key} VALUE to the command line"
        for key in keys
    ]
    raise ConfigurationError(
        f"expected a value for {', '.join(keys)}, but got {REDACTED!r}: saved settings hold no secrets; "
        + " and ".join(ways)
    )


def _seed(seed_everything: bool | int) -> int:
    return 0 if isinstance(seed_everything, bool) else seed_everything

"""``resume``: go on with a run, given only its folder."""

from pathlib import Path

from grpo_lightning.cli.lightning_command import check_config_files
from grpo_lightning.runs import find_run

_HELP = """\
Go on with a run from its newest checkpoint, in the same folder.

usage: grpo-lightning resume RUN [--SETTING VALUE ...]

  RUN  folder of the run, with config.yaml and checkpoints/

Settings are those of fit (grpo-lightning fit --help); they win over the run's own.

Example:

  grpo-lightning resume runs/demo/version_0 --trainer.max_epochs 30"""


def main(command: str, args: list[str]) -> None:
    """Run ``fit`` with the run's own settings and newest checkpoint."""
    if not args or {"-h", "--help"} & set(args):
        print(_HELP)
        return
    folder = Path(args[0])
    config, checkpoint = find_run(folder)
    check_config_files(args[1:])

    from grpo_lightning.cli.lightning_cli import run_lightning

    run_lightning(["fit", "-c", str(config), "--ckpt_path", str(checkpoint), *args[1:]], resumed_run=folder.resolve())

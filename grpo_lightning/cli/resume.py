"""``resume``: go on with a run, given only its folder."""

from pathlib import Path

from grpo_lightning.runs import find_run

_HELP = """\
Go on with a run from its newest checkpoint, in the same folder.

usage: grpo-lightning resume RUN [--SETTING VALUE ...]

  RUN  folder of the run, with config.yaml and checkpoints/

Example:

  grpo-lightning resume runs/demo/version_0 --trainer.max_epochs 30"""


def main(command: str, args: list[str]) -> None:
    """Run ``fit`` with the run's own settings and newest checkpoint."""
    if not args or args[0] in ("-h", "--help"):
        print(_HELP)
        return
    folder = Path(args[0])
    config, checkpoint = find_run(folder)

    from grpo_lightning.cli.lightning_cli import run_lightning

    run_lightning(["fit", "-c", str(config), "--ckpt_path", str(checkpoint), *args[1:]], resumed_run=folder.resolve())

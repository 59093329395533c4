"""Every command that the page on the command line shows exists, with settings that exist."""

import re
import shlex
from pathlib import Path

from grpo_lightning.cli import main
from grpo_lightning.cli.lightning_cli import DATA, MODEL, settings_of
from grpo_lightning.cli.main import COMMANDS

PAGE = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")


def shown():
    text = PAGE.replace("\\\n", " ")
    return [
        shlex.split(line, comments=True) for line in re.findall(r"^\$ grpo-lightning (.+)$", text, flags=re.MULTILINE)
    ]


def test_every_command_is_shown():
    assert {args[0] for args in shown()} - {"-c"} == set(COMMANDS)


def test_the_list_of_configurations_is_what_is_printed(capsys):
    assert main(["ls"]) == 0
    assert f"$ grpo-lightning ls\n{capsys.readouterr().out}$ grpo-lightning cp" in PAGE


def test_settings_exist():
    keys = {f"model.{s}" for s in settings_of(MODEL)} | {f"data.{s}" for s in settings_of(DATA)}
    keys |= {f"trainer.{s}" for s in settings_of("lightning.pytorch.Trainer")}
    keys |= {"model", "model.my_setting", "model.lerning_rate", "data.predict_tasks.path"}
    used = {arg.removeprefix("--") for args in shown() for arg in args if re.match(r"--(model|data|trainer)", arg)}
    assert len(used) > 8
    assert used <= keys

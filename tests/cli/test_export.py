"""What the command line hands to `grpo_lightning.export`."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from grpo_lightning.cli import main


@pytest.fixture
def exported(monkeypatch):
    calls = []
    module = ModuleType("grpo_lightning.export")

    def export(source, target, *, merged, dtype):
        calls.append((source, target, merged, dtype))
        return ["What the folder cannot hold."]

    module.export = export
    monkeypatch.setitem(sys.modules, "grpo_lightning.export", module)
    return calls


@pytest.mark.parametrize(
    ("options", "merged", "dtype"), [([], False, None), (["--merged", "--dtype", "bfloat16"], True, "bfloat16")]
)
def test_arguments_arrive(folder, exported, options, merged, dtype, capsys):
    (folder / "run").mkdir()
    assert main(["export", "run", "there", *options]) == 0
    assert exported == [(Path("run"), Path("there"), merged, dtype)]
    assert capsys.readouterr().out == "there\nWhat the folder cannot hold.\n"


def test_a_source_that_is_not_there(folder, exported, capsys):
    assert main(["export", "run", "there"]) == 2
    assert "there is nothing at run" in capsys.readouterr().err
    assert exported == []

from pathlib import Path

import pytest

from grpo_lightning.cli import main
from grpo_lightning.cli.configs import copy, shipped
from grpo_lightning.errors import ConfigurationError

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_all_that_is_there_is_listed(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    whole = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    layers = sorted(f"algorithms/{path.stem}" for path in (CONFIGS / "algorithms").glob("*.yaml"))
    assert [line.split()[0] for line in lines] == [*whole, *layers]
    assert all(len(line.split()) > 4 for line in lines), "each says what it is"
    assert "The demo: SmolLM2-135M-Instruct learns sums" in lines[0]


@pytest.mark.parametrize(
    ("target", "expected"),
    [(None, "demo_cpu.yaml"), ("mine.yaml", "mine.yaml"), (".", "demo_cpu.yaml"), ("new/mine.yaml", "new/mine.yaml")],
)
def test_a_copy_is_the_same(folder, target, expected, capsys):
    assert main(["cp", "demo_cpu", *([target] if target else [])]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert (folder / expected).read_bytes() == (CONFIGS / "demo_cpu.yaml").read_bytes()


def test_a_copy_of_an_algorithm(folder, capsys):
    assert main(["cp", "algorithms/dapo"]) == 0
    assert capsys.readouterr().out == "dapo.yaml\n"
    assert (folder / "dapo.yaml").read_bytes() == (CONFIGS / "algorithms" / "dapo.yaml").read_bytes()


def test_nothing_is_overwritten(folder):
    (folder / "demo_cpu.yaml").write_text("mine")
    with pytest.raises(ConfigurationError, match="expected a new file, but demo_cpu.yaml exists already"):
        copy("demo_cpu.yaml")
    assert (folder / "demo_cpu.yaml").read_text() == "mine"


def test_an_unknown_name(folder):
    with pytest.raises(ConfigurationError, match=f"choose one of {', '.join(shipped())}"):
        copy("banana")


def test_an_algorithm_without_its_folder(folder):
    with pytest.raises(ConfigurationError, match="did you mean algorithms/dapo"):
        copy("dapo")

"""The README's script runs as it is shown, with a real engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def script():
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return block


def test_the_script_is_short():
    assert len(script().strip().splitlines()) <= 30


@pytest.mark.vllm
@pytest.mark.slow
def test_the_script_runs(tmp_path, demo_model):
    path = tmp_path / "train.py"
    path.write_text(script())
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2/2 | reward" in done.stdout


def test_files_and_commands_it_names_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (root / target).exists(), target
    makefile = (root / "Makefile").read_text()
    for command in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{command}:" in makefile

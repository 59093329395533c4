"""Dispatch, guides and exit codes, none of which needs torch."""

import json
import subprocess
import sys
import time

import pytest

from grpo_lightning.cli import main
from grpo_lightning.cli.guide import guide
from grpo_lightning.cli.main import COMMANDS


@pytest.mark.parametrize(
    "args", [[], ["--help"], ["-h"], ["fit", "-h"], ["resume", "-h"], ["ls"], ["--version"], ["ft"]]
)
def test_what_needs_no_model_is_quick(args):
    code = (
        f"import json, sys; sys.argv = ['grpo-lightning', *{args!r}]\n"
        "from grpo_lightning.cli import main; main()\n"
        "heavy = ['torch', 'lightning', 'vllm', 'transformers', 'jsonargparse']\n"
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    # Importing torch alone takes longer; a busy machine is given some room.
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_the_guide_lists_every_command(args, capsys):
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  grpo")] == list(
        COMMANDS
    )


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_guides_are_short(command, capsys):
    assert main([command, "-h"]) == 0
    assert capsys.readouterr().out == guide(command) + "\n"
    lines = guide(command).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("fit", "validate", "predict")])
def test_our_own_commands_have_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"grpo-lightning {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ft"], "there is no command 'ft'; did you mean 'fit'?"),
        (["rewards-check"], "did you mean 'reward-check'?"),
        (["banana"], "choose one of fit, validate, predict, resume"),
        (
            ["-c", "x.yaml", "fit", "--a"],
            "expected the command first, but got '-c'; run: grpo-lightning fit -c x.yaml --a",
        ),
        (["-c", "my x.yaml", "fit"], "run: grpo-lightning fit -c 'my x.yaml'"),
        (["--verson"], "expected a command first, but got '--verson'"),
        (["validate", "--dry-run"], "--dry-run goes with fit, not with validate"),
        (["fit", "-c", "nowhere.yaml"], "expected a configuration file, but there is none at nowhere.yaml"),
        (["reward-check", "-c", "nowhere.yaml"], "there is none at nowhere.yaml"),
        (["resume", "nowhere"], "expected a run to resume in nowhere, but it holds none; looked for"),
        (["export", "nowhere", "there"], "there is nothing at nowhere"),
        (["cp", "demo_cpuu"], "there is no configuration 'demo_cpuu'; did you mean demo_cpu?"),
    ],
)
def test_mistakes_are_named_on_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  model: x\n  learning_rate: [1\n", r"broken.yaml, line 4: expected YAML, but expected ',' or ']'"),
        ("- a\n- b\n", "expected settings by name in broken.yaml, but got list"),
        ("", "expected settings by name in broken.yaml, but got nothing"),
    ],
)
def test_a_broken_file_is_named_with_its_line(text, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text(text)
    assert main(["fit", "--config=broken.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_the_module_runs_too():
    done = subprocess.run(
        [sys.executable, "-m", "grpo_lightning", "fit", "-c", "nowhere.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a configuration file")


def test_modules_of_the_working_folder_are_found(tmp_path):
    (tmp_path / "my_own_rewards.py").write_text("print('imported')")
    program = (
        "import sys; sys.path = [p for p in sys.path if p]; "
        "from grpo_lightning.cli import main; main(['ls']); import my_own_rewards"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("imported\n"), done.stderr

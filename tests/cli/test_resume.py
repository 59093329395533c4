"""Going on with a run from its folder alone, with the commands that a run prints."""

import csv
import json
import re
import shlex
import shutil

import pytest
import yaml

from grpo_lightning.cli import main

RUN = "runs/small run/version_0"


def steps(folder):
    """Epoch and step of each training row of the metrics."""
    with (folder / RUN / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(int(float(r["epoch"])), int(r["step"])) for r in rows if r["reward/mean"]]


def completions(folder):
    return [json.loads(line)["epoch"] for line in (folder / RUN / "completions.jsonl").read_text().splitlines()]


def test_a_run_goes_on_in_its_folder(settings, folder):
    assert main(["fit", *settings]) == 0
    assert main(["resume", RUN, "--trainer.max_epochs=4"]) == 0
    assert steps(folder) == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert completions(folder) == [e for e in range(4) for _ in range(4)]
    assert [path.name for path in (folder / "runs/small run").iterdir()] == ["version_0"]
    assert [path.name for path in (folder / RUN / "checkpoints").glob("last*")] == ["last.ckpt"]
    # Settings given when it went on are those of the next time.
    assert main(["resume", RUN]) == 0
    assert len(steps(folder)) == 4


def test_what_came_after_the_checkpoint_stands_there_once(settings, folder):
    assert main(["fit", *settings, "--trainer.max_epochs=3"]) == 0
    checkpoints = folder / RUN / "checkpoints"
    # The newest ones were lost, and one was cut off while it was written.
    (checkpoints / "last.ckpt").write_bytes((checkpoints / "last.ckpt").read_bytes()[:1000])
    (late,) = checkpoints.glob("*step=6.ckpt")
    late.unlink()
    assert main(["resume", RUN]) == 0
    assert steps(folder) == [(0, 1), (1, 3), (2, 5)]
    assert completions(folder) == [e for e in range(3) for _ in range(4)]


def test_a_run_that_was_moved_goes_on_where_it_is(settings, folder):
    assert main(["fit", *settings]) == 0
    shutil.move(folder / "runs", folder / "elsewhere")
    assert main(["resume", "elsewhere/small run/version_0", "--trainer.max_epochs=3"]) == 0
    assert not (folder / "runs").exists()
    assert (folder / "elsewhere/small run/version_0/metrics.csv").read_text().count("\n") > 3


def test_wrong_overrides_leave_the_run_as_it_is(settings, folder, capsys):
    assert main(["fit", *settings]) == 0
    before = (folder / RUN / "metrics.csv").read_text()
    assert main(["resume", RUN, "--model.lerning_rate=1"]) == 2
    assert "did you mean model.learning_rate?" in capsys.readouterr().err
    assert (folder / RUN / "metrics.csv").read_text() == before


def contents(folder):
    """All that a run keeps but its summary, which any end rewrites."""
    files = (path for path in (folder / RUN).rglob("*") if path.is_file() and path.name != "summary.json")
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "override",
    [
        "--trainer.reload_dataloaders_every_n_epochs=2",
        "--model.lora_rank=4",
        "--data.rewards=[own_parts.text]",
    ],
)
def test_a_run_that_cannot_go_on_keeps_its_records(settings, folder, override):
    assert main(["fit", *settings, "--trainer.max_epochs=3"]) == 0
    checkpoints = folder / RUN / "checkpoints"
    for path in (checkpoints / "last.ckpt", *checkpoints.glob("*step=6.ckpt")):
        path.unlink()
    before = contents(folder)
    assert main(["resume", RUN, override]) != 0
    assert contents(folder) == before
    # What can go on still does, with the settings that it had.
    assert main(["resume", RUN]) == 0
    assert steps(folder) == [(0, 1), (1, 3), (2, 5)]


@pytest.mark.parametrize(
    ("logger", "got"), [("false", "none"), ("grpo_lightning.loggers.TrackioLogger", "TrackioLogger")]
)
def test_a_logger_that_has_no_folder_to_go_on_in_is_refused(settings, folder, logger, got, capsys):
    assert main(["fit", *settings]) == 0
    before = contents(folder)
    project = [] if logger == "false" else ["--trainer.logger.project=sums"]
    assert main(["resume", RUN, f"--trainer.logger={logger}", *project]) == 2
    error = capsys.readouterr().err
    assert f"expected CSVLogger or TensorBoardLogger as the run's first logger, but got {got}" in error
    assert contents(folder) == before
    # The command that it names works.
    command = shlex.split(error.partition("grpo-lightning ")[2])
    assert main([*command, "--trainer.logger.version=next", "--trainer.max_epochs=3"]) == 0


def test_secrets_that_were_left_out_are_asked_for(settings, folder, capsys):
    given = ["--data.engine=short_run.EngineWithSettings", "--data.engine.env={API_KEY: secret}"]
    assert main(["fit", *settings, *given]) == 0
    assert main(["resume", RUN]) == 2
    key = "data.init_args.engine.init_args.env.API_KEY"
    assert (
        f"expected a value for {key}, but got '[redacted]': saved settings hold no secrets; add --{key} VALUE to the "
        "command line" in capsys.readouterr().err
    )
    assert main(["fit", "-c", f"{RUN}/config.yaml"]) == 2
    assert main(["resume", RUN, f"--{key}", "secret", "--trainer.max_epochs=3"]) == 0
    assert len(steps(folder)) == 3


def test_a_secret_within_a_list(settings, folder, capsys):
    logger = {"class_path": "short_run.LoggerWithKey", "init_args": {"save_dir": "runs", "api_key": "[redacted]"}}
    (folder / "logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [logger]}}))
    assert main(["fit", *settings, "-c", "logger.yaml"]) == 2
    key = "trainer.logger[0].init_args.api_key"
    assert f"edit {key} in a copy of the configuration file" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["-h"], [RUN, "-h"], [RUN, "--help"]])
def test_help_is_short(folder, args, capsys):
    assert main(["resume", *args]) == 0
    assert capsys.readouterr().out.startswith("Go on with a run from its newest checkpoint")


def test_settings_that_are_not_there(settings, folder, capsys):
    assert main(["fit", *settings, "--trainer.max_epochs=1"]) == 0
    assert main(["resume", RUN, "-c", "missing.yaml"]) == 2
    assert "expected a configuration file, but there is none at missing.yaml" in capsys.readouterr().err


def test_every_printed_command_works(settings, folder, capsys):
    assert main(["fit", *settings]) == 0
    card = capsys.readouterr().out
    printed = re.findall(r"^(\S[\w ]+): +grpo-lightning (.+)$", card, flags=re.MULTILINE)
    assert [name for name, _ in printed] == ["Go on", "Evaluate", "Export"]
    for _, command in printed:
        assert main(shlex.split(command)) == 0, command
    assert (folder / RUN / "export" / "adapter_config.json").is_file()
    # Going on means more epochs than the run had.
    assert len(steps(folder)) == 4


def test_an_interrupted_run_prints_how_to_go_on(settings, folder, capsys):
    assert main(["fit", *settings, "--trainer.max_epochs=3", "--data.rewards=[own_parts.FailsLate]"]) == 1
    out, err = capsys.readouterr()
    assert "FailsLate" in err
    assert f"Go on:       grpo-lightning resume '{RUN}'\n" in out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"run/config.yaml \(not there\), run/checkpoints/\*.ckpt \(not there\)"),
        (["config.yaml"], r"run/config.yaml \(found\), run/checkpoints/\*.ckpt \(not there\)"),
        (
            ["config.yaml", "checkpoints/last.ckpt"],
            r"\*.ckpt \(found\), run/checkpoints/\*.ckpt \(whole\) \(not there\)",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused(folder, files, message, capsys):
    for name in files:
        path = folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a checkpoint")
    assert main(["resume", "run"]) == 2
    error = capsys.readouterr().err
    assert "expected a run to resume in run, but it holds none; looked for" in error
    assert re.search(message, error)

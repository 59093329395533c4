import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loggers import TrackioLogger

ALONE = """
import atexit, json, socket, sys

attempts = []
atexit.register(lambda: print(json.dumps(attempts)))  # after all others
def refuse(*args, **kwargs):
    attempts.append(repr(args))
    raise OSError("no network in this test")
socket.getaddrinfo = refuse
socket.socket.connect = lambda self, address: refuse(address)

from grpo_lightning.loggers import TrackioLogger
logger = TrackioLogger("p", "r", dir=sys.argv[1])
logger.log_hyperparams({"lr": 1.0})
logger.log_metrics({"a": 1.0}, step=0)
logger.finalize("success")
"""


def stored(logger):
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(logger.name, run_id=logger.experiment.id)


def test_without_a_space_nothing_reaches_for_the_network(tmp_path):
    """Trackio would ask the hub who this is, and follow the environment to a Space or a server."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_TOKEN": "hf_" + 24 * "a",
        "TRACKIO_SPACE_ID": "someone/space",
        "TRACKIO_SERVER_URL": "http://127.0.0.1:9/?write_token=x",
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert (tmp_path / "p.db").stat().st_size


def test_the_environment_is_as_before_once_the_run_has_started(trackio_directory, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    logger = TrackioLogger("environment", dir=trackio_directory)
    assert logger.experiment is not None
    assert os.environ["TRACKIO_SPACE_ID"] == "someone/space"
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_metrics_keep_their_steps_also_after_finalize(trackio_directory):
    logger = TrackioLogger("steps", dir=trackio_directory, prefix="x")
    logger.log_metrics({"a": 1.0}, step=3)
    logger.finalize("success")
    logger.log_metrics({"a": 2.0}, step=7)
    logger.finalize("success")
    assert [(row["step"], row["x-a"]) for row in stored(logger)] == [(3, 1.0), (7, 2.0)]


@pytest.mark.parametrize("kind", [dict, lambda **settings: Namespace(**settings)])
def test_hyperparameters_are_flat_and_without_secrets(trackio_directory, kind):
    logger = TrackioLogger("settings", dir=trackio_directory)
    logger.log_hyperparams(kind(lr=0.1, hf_token="hunter2", engine={"api_key": "hunter2", "seed": 1}, _class_path="x"))
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("success")

    import trackio

    run = next(r for r in trackio.Api().runs("settings") if r.id == logger.experiment.id)
    config = {k: v for k, v in run.config.items() if not k.startswith("_")}
    assert config == {"lr": 0.1, "hf_token": "[redacted]", "engine/api_key": "[redacted]", "engine/seed": 1}
    assert b"hunter2" not in (trackio_directory / "settings.db").read_bytes()


def test_runs_of_one_name_are_told_apart(trackio_directory):
    first, second = (TrackioLogger("names", "same", dir=trackio_directory) for _ in range(2))
    assert first.version == "same"
    assert first.experiment is not second.experiment
    assert first.version != second.version
    assert first.version.startswith("same-")
    assert (first.name, first.save_dir) == ("names", str(trackio_directory))


def test_another_directory_is_refused(trackio_directory, tmp_path):
    _ = TrackioLogger("p", dir=trackio_directory).experiment
    with pytest.raises(ConfigurationError, match="expected Trackio to write to .*, but got dir=.*the same dir"):
        TrackioLogger("p", dir=tmp_path)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigurationError, match=r"grpo-lightning\[trackio\]"):
        TrackioLogger("p")


def test_importing_the_loggers_imports_no_tool():
    code = (
        "import sys, grpo_lightning.loggers; "
        "print([m for m in ('trackio', 'wandb', 'mlflow', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr

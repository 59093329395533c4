"""No secret of a run's settings is in the run's folder."""

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from short_run import short_run

from grpo_lightning import GRPOModule
from grpo_lightning.callbacks.save_config import SaveConfig
from grpo_lightning.cli import run

SECRETS = ["hunter2", "correct-horse", "battery-staple", "hf_" + 30 * "b", "me:pass@host"]
CONFIG = f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - class_path: short_run.LoggerWithKey
      init_args: {{save_dir: logs, api_key: {SECRETS[0]}}}
    - class_path: lightning.pytorch.loggers.TensorBoardLogger
      init_args: {{save_dir: boards}}
  callbacks:
    - class_path: grpo_lightning.callbacks.RatioDegeneracyDetector
      init_args: {{max_mismatch: 100}}
    - class_path: grpo_lightning.callbacks.CompletionLog
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{save_last: true}}
model:
  dtype: float32
  learning_rate: 1.0e-5
data:
  tasks:
    class_path: grpo_lightning.tasks.SumTasks
    init_args: {{max_number: 5}}
  rewards: [short_run.length]
  engine:
    class_path: short_run.EngineWithSettings
    init_args:
      engine_args:
        hf_token: {SECRETS[1]}
        max_model_len: 512
        extra: [--token, "{SECRETS[3]}", "redis://{SECRETS[4]}/0"]
      env: {{OPENAI_API_KEY: {SECRETS[2]}, OMP_NUM_THREADS: "1"}}
  prompts_per_rollout: 2
  samples_per_prompt: 2
  max_tokens: 6
  max_prompt_tokens: 64
"""


def secrets_below(folder, secrets):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [(secret, path.name) for path in files for secret in secrets if secret.encode() in path.read_bytes()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "settings.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_nothing_that_a_run_of_the_command_line_writes_holds_a_secret(folder, tiny_model):
    cli = run(["fit", "-c", "../settings.yaml", f"--model.model={tiny_model}"])
    assert secrets_below(folder, SECRETS) == []
    version = folder / "logs" / "lightning_logs" / "version_0"
    saved = yaml.safe_load((version / "config.yaml").read_text())
    arguments = saved["data"]["init_args"]["engine"]["init_args"]
    assert arguments == {
        "engine_args": {
            "hf_token": "[redacted]",
            "max_model_len": 512,
            "extra": ["--token", "[redacted]", "redis://[redacted]@host/0"],
        },
        "env": {"OPENAI_API_KEY": "[redacted]", "OMP_NUM_THREADS": "1"},
    }
    assert saved["trainer"]["logger"][0]["init_args"]["api_key"] == "[redacted]"
    assert saved["model"]["init_args"]["learning_rate"] == 1e-5
    assert (version / "checkpoints" / "last.ckpt").is_file()
    # The run itself had them.
    assert cli.config["fit"]["data"]["init_args"]["engine"]["init_args"]["engine_args"]["hf_token"] == SECRETS[1]


def test_settings_are_never_overwritten(folder, tiny_model):
    logger = "--trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: x, version: 0}}"
    cli = run(["validate", "-c", "../settings.yaml", f"--model.model={tiny_model}", logger])
    save = next(c for c in cli.trainer.callbacks if isinstance(c, SaveConfig))
    version = folder / "x" / "lightning_logs" / "version_0"
    (version / "config.yaml").write_text("mine")
    for _ in range(2):
        save.save_config(cli.trainer, cli.model, "fit")
    assert (version / "config.yaml").read_text() == "mine"
    for name in ("config-1.yaml", "config-2.yaml"):
        assert yaml.safe_load((version / name).read_text())["model"]["init_args"]["model"] == tiny_model


class ModuleWithToken(GRPOModule):
    def __init__(self, model: str, hub_token: str, proxies: dict[str, str]) -> None:
        super().__init__(model, dtype="float32", lora_rank=4)
        self.save_hyperparameters()


def test_hyperparameters_are_logged_and_saved_without_secrets(tmp_path, tiny_model):
    module = ModuleWithToken(tiny_model, SECRETS[0], {"https": f"https://{SECRETS[4]}"})
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = short_run(tiny_model, tmp_path, loggers, module=module, enable_checkpointing=True)
    assert isinstance(trainer, Trainer)
    assert list(tmp_path.rglob("*.ckpt"))
    assert secrets_below(tmp_path, SECRETS) == []
    logged = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert logged["hub_token"] == "[redacted]"
    assert logged["proxies"] == {"https": "https://[redacted]@host"}
    assert logged["lora_rank"] == 4
    # The module works with what it was given.
    assert module.hparams["hub_token"] == SECRETS[0]

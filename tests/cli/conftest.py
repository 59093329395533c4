"""Small runs from the command line, with parts that need neither GPU nor vLLM."""

import pytest
import yaml


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def settings(folder, tiny_model):
    """Command line of a small fit; the settings are in ``small.yaml``."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": "small run"},
    }
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "every_n_epochs": 1, "save_top_k": -1, "save_on_train_epoch_end": True},
    }
    detector = {
        # The fake engine's logprobs are random numbers.
        "class_path": "grpo_lightning.callbacks.RatioDegeneracyDetector",
        "init_args": {"max_mismatch": 100},
    }
    content = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": [logger],
            "callbacks": [
                checkpoint,
                detector,
                {"class_path": "grpo_lightning.callbacks.CompletionLog"},
                {"class_path": "grpo_lightning.callbacks.RunSummary", "init_args": {"plot": False}},
            ],
        },
        "model": {"model": tiny_model, "dtype": "float32", "learning_rate": 1e-3},
        "data": {
            "tasks": {"class_path": "grpo_lightning.tasks.SumTasks"},
            "val_size": 2,
            "rewards": ["real.one_is_longer"],
            "engine": {"class_path": "fakes.FakeEngine"},
            "prompts_per_rollout": 2,
            "samples_per_prompt": 2,
            "updates_per_rollout": 2,
            "max_tokens": 6,
            "max_prompt_tokens": 64,
        },
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return ["-c", "small.yaml"]

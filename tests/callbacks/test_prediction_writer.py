"""``predict``: a file of prompts in, a file of completions with logprobs and rewards out."""

import json

import pytest
from fakes import FakeEngine
from hypothesis import given, settings
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from trajectories import rollouts

from grpo_lightning import GRPOModule, RolloutDataModule, TransformersEngine
from grpo_lightning.callbacks import PredictionWriter
from grpo_lightning.callbacks.prediction_writer import prediction_records
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rewards import last_number_correct
from grpo_lightning.tasks import JsonlTasks, SumTasks


def length(completion):
    return float(len(completion))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"What is {i} + 1?"}) + "\n" for i in range(5)))
    return path


def predict(tmp_path, tiny_model, engine, **data):
    given_ = {"max_tokens": 6, "max_prompt_tokens": 64, "val_batch_size": 2, "engine": engine, **data}
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="", version="run"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.predict(GRPOModule(tiny_model), RolloutDataModule(SumTasks(), [last_number_correct, length], **given_))
    (writer,) = [c for c in trainer.callbacks if isinstance(c, PredictionWriter)]
    return [json.loads(line) for line in writer.path.read_text().splitlines()]


def test_completions_logprobs_and_rewards(tmp_path, tiny_model, prompts, capsys):
    engine = FakeEngine()
    records = predict(
        tmp_path, tiny_model, engine, predict_tasks=JsonlTasks(prompts), predict_samples=2, predict_temperature=0.7
    )
    assert [r["task"] for r in records] == [f"p{i}" for i in range(5) for _ in range(2)]
    for record in records:
        assert len(record["token_ids"]) == len(record["logprobs"]) > 0
        assert record["logprob_sum"] == pytest.approx(sum(record["logprobs"]))
        # The prompts have no answers: the reward that needs one is left out.
        assert record["rewards"] == {"length": len(record["completion"])}
        assert record["reward"] == len(record["completion"])
        assert record["finish_reason"] in ("stop", "length")
        assert record["policy_version"] == 0
    assert records[0]["prompt"] == [{"role": "user", "content": "What is 0 + 1?"}]
    # Two samples of a prompt are drawn with different seeds.
    assert records[0]["token_ids"] != records[1]["token_ids"]
    assert {request[1].temperature for request in engine.requests} == {0.7}
    assert f"Predictions: {tmp_path / 'run' / 'predictions.jsonl'}" in capsys.readouterr().out


def test_greedily_by_default_and_with_the_real_engine(tmp_path, tiny_model, prompts):
    records = predict(tmp_path, tiny_model, TransformersEngine(), predict_tasks=JsonlTasks(prompts))
    assert len(records) == 5
    # Greedy: another run says the same, in a file of its own.
    assert predict(tmp_path, tiny_model, TransformersEngine(), predict_tasks=JsonlTasks(prompts)) == records
    names = {path.name for path in (tmp_path / "run").glob("*.jsonl")}
    assert names == {"predictions.jsonl", "predictions-1.jsonl"}


def test_all_rewards_apply_where_the_answers_are_there(tmp_path, tiny_model):
    records = predict(tmp_path, tiny_model, FakeEngine(), predict_tasks=SumTasks(1))
    assert all(set(r["rewards"]) == {"last_number_correct", "length"} for r in records)


def test_the_data_module_scores_as_before_afterwards(tmp_path, tiny_model, prompts):
    data = RolloutDataModule(SumTasks(), last_number_correct, engine=FakeEngine(), predict_tasks=JsonlTasks(prompts))
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    trainer.predict(GRPOModule(tiny_model), data)
    assert data.scorer.names == ("last_number_correct",)


@settings(max_examples=30, deadline=None)
@given(rollouts(2))
def test_records_of_random_episodes_hold_what_was_sampled(groups):
    records = list(prediction_records(groups))
    episodes = [(group.task, episode) for group in groups for episode in group.episodes]
    assert len(records) == len(episodes)
    for record, (task, episode) in zip(records, episodes, strict=True):
        actions = [turn.action for turn in episode.turns if not turn.action.was_forced]
        assert record["token_ids"] == [token for action in actions for token in action.token_ids]
        assert record["logprobs"] == [value for action in actions for value in action.token_logprobs]
        assert record["logprob_sum"] == pytest.approx(sum(action.logprob_sum for action in actions))
        assert (record["task"], record["tokens"]) == (task.id, len(record["token_ids"]))
        assert json.loads(json.dumps(record)) == record


def test_without_tasks_it_is_refused(tmp_path, tiny_model):
    engine = FakeEngine()
    with pytest.raises(ConfigurationError, match="predict needs tasks, but there are none; set predict_tasks"):
        predict(tmp_path, tiny_model, engine)
    assert not engine.specs, "nothing was started"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predict_samples": 0}, "expected predict_samples > 0 and finite, but got 0"),
        ({"predict_temperature": -1.0}, "expected predict_temperature >= 0, but got -1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        RolloutDataModule(SumTasks(), length, engine=FakeEngine(), **settings)


def test_a_fit_has_no_writer(tiny_model):
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1, enable_progress_bar=False)
    assert "PredictionWriter" not in {type(c).__name__ for c in trainer.callbacks}
    module = GRPOModule(tiny_model)
    module.trainer = trainer
    trainer.training = True
    assert "PredictionWriter" not in {type(c).__name__ for c in module.configure_callbacks()}
    trainer.predicting = True
    assert "PredictionWriter" in {type(c).__name__ for c in module.configure_callbacks()}

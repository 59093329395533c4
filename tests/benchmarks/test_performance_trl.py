"""The comparison with TRL: its cases, the search for TRL's settings, gradients, tables, and this project's side."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.performance.stored import ROOT
from benchmarks.performance.trl import gradients, learning, sides, speed
from benchmarks.performance.trl.cases import ADAPTER, LEARNING, LONG, SHORT, characters, digest, smoke, tasks
from benchmarks.performance.trl.search import GIVE_UP, Settings, axes, search, start
from benchmarks.performance.turns import Side, environment

TURN = {"phases": {"rollout": 6.0, "train": 3.0}, "tokens": 48.0, "peak_gib": 2.0, "reward": 0.5}


def words(messages):
    """An encoder with a token a word and three of the template."""
    return [0, 1, 2, *(len(word) for word in messages[0]["content"].split())]


def test_sums_are_drawn_once_and_in_the_same_order():
    found = tasks(SHORT, 7, words)
    assert len({task.id for task in found}) == 56
    assert [task.id for task in tasks(SHORT, 2, words)] != sorted(task.id for task in tasks(SHORT, 2, words))
    assert tasks(SHORT, 7, words) == found
    with pytest.raises(ValueError, match="expected at most 441 tasks, but 60 updates need 480"):
        tasks(SHORT, 60, words)


def test_long_prompts_are_exactly_so_long():
    found = tasks(LONG, 6, words)
    assert {len(words(task.messages)) for task in found} == {1000}
    texts = [task.messages[0]["content"] for task in found]
    assert len({text.splitlines()[0] for text in texts}) > 9
    a, b = texts[0].split("what is ")[1].rstrip("?").split(" + ")
    assert int(a) + int(b) == int(found[0].data["answer"])
    with pytest.raises(ValueError, match="but 8 are asked for"):
        tasks(replace(LONG, prompt_tokens=8), 1, words)


def test_a_filler_that_is_not_one_token_is_noticed():
    def encode(messages):
        return words(messages) + [0] * messages[0]["content"].count(" so")

    with pytest.raises(ValueError, match="expected a prompt of 500 tokens, but it has"):
        tasks(replace(LONG, prompt_tokens=500), 3, encode)


def test_the_adapter_is_the_projects_default():
    from grpo_lightning.adapter_config import DEFAULT_ALPHA, DEFAULT_RANK

    assert (ADAPTER["r"], ADAPTER["lora_alpha"]) == (DEFAULT_RANK, DEFAULT_ALPHA)
    assert len(ADAPTER["target_modules"]) == 7


def test_what_names_prompts():
    assert digest([[1, 2], [3]]) == digest([(1, 2), (3,)])
    assert len({digest(ids) for ids in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]])}) == 3
    assert characters("a" * 50) == 0.5


def test_small_cases_keep_their_kind():
    assert (smoke(LONG).prompt_tokens, smoke(SHORT).prompt_tokens) == (120, 0)
    assert smoke(LEARNING).exact is False


def seconds_of(settings):
    """A machine on which float32 is slow, larger micro-batches pay until memory ends, and one thread is slow."""
    if settings.batch > 32:
        return {"problem": "killed"}
    seconds = 40 + 30 * (settings.dtype == "float32") - 5 * settings.autocast + 20 * settings.checkpointing
    return {
        "seconds": seconds - settings.batch / 4 + 40 * (settings.threads == 1 or settings.compile) - settings.preload,
        "peak_gib": 3.0,
    }


def test_the_search_finds_the_best_and_keeps_what_it_tried():
    limits = []

    def step(settings, limit):
        limits.append(limit)
        return seconds_of(settings)

    best, tried = search(SHORT, 2, step)
    assert best == Settings(autocast=True, batch=32, preload=True)
    assert tried[0] == {**asdict(Settings()), "seconds": 36.0, "peak_gib": 3.0}
    assert len(tried) == 1 + sum(len(changes) for _, changes in axes(SHORT, 2))
    assert [one["problem"] for one in tried if "problem" in one] == ["killed"]
    assert limits[0] is None
    assert limits[1] == GIVE_UP * 36
    assert limits[-1] == GIVE_UP * min(one["seconds"] for one in tried[:-1] if "seconds" in one)


def test_settings_of_an_axis_start_from_the_best_of_the_axis_before():
    """Two changes of one axis are not heaped upon each other."""
    asked = []
    search(SHORT, 2, lambda settings, limit: asked.append(settings) or seconds_of(settings))
    dtypes = [(settings.dtype, settings.autocast) for settings in asked[:4]]
    assert dtypes == [("bfloat16", False), ("bfloat16", True), ("float32", False), ("float32", True)]


def test_the_search_begins_with_what_fits_into_memory():
    assert (start(SHORT, 2).batch, start(LONG, 2).batch, start(smoke(LONG), 2).batch) == (16, 4, 4)
    assert {change["batch"] for _, changes in axes(LONG, 2) for change in changes if "batch" in change} == {2, 8, 16}
    assert not dict(axes(SHORT, 1))["threads"]
    with pytest.raises(RuntimeError, match="TRL does not take a step with Settings.*killed"):
        search(SHORT, 2, lambda settings, limit: {"problem": "killed"})


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    timed = []

    def step(spec, settings, limit):
        timed.append(settings)
        if len(timed) == 4:
            raise KeyboardInterrupt
        return seconds_of(settings)

    monkeypatch.setattr(sides, "WORK", tmp_path)
    monkeypatch.setattr(sides, "cores", lambda: 2)
    monkeypatch.setattr(sides, "asked", lambda *what: {})
    monkeypatch.setattr(sides, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        sides.best_settings(SHORT, "model", "full")
    found = sides.best_settings(SHORT, "model", "full")
    assert found == sides.best_settings(SHORT, "model", "full")
    # The one that was stopped is timed again, and no other.
    assert len(timed) == len(found["tried"]) + 1
    assert found["best"] == asdict(Settings(autocast=True, batch=32, preload=True))
    sides.best_settings(replace(SHORT, tokens=32), "model", "full")
    assert len(timed) == 2 * len(found["tried"]) + 1


@pytest.fixture
def result():
    turns = {
        "trl": [{**TURN, "seconds": seconds} for seconds in (32.0, 16.0, 64.0)],
        "ours": [
            {**TURN, "seconds": seconds, "phases": {"rollout": 1.0, "train": 0.5, "sync": 0.1, "doctor": 0.2}}
            for seconds in (2.0, 2.0, 4.0)
        ],
    }
    tried = [
        {**asdict(Settings()), "seconds": 31.0, "peak_gib": 2.0},
        {**asdict(Settings(threads=1)), "problem": "a|b"},
    ]
    return {
        "engine": "vllm",
        "cases": {"short": speed.summary(SHORT, turns) | {"search": {"best": asdict(Settings()), "tried": tried}}},
    }


def test_the_summary_of_a_case(result):
    case = result["cases"]["short"]
    assert case["speedup"] == {"median": 16.0, "min": 8.0, "max": 16.0}
    assert case["samples_per_second"]["ours"] == {"median": 32.0, "min": 16.0, "max": 32.0}
    assert case["phases"]["trl"] == {"rollout": 6.0, "train": 3.0, "other": 23.0}
    assert case["phases"]["ours"]["other"] == pytest.approx(0.2)
    assert speed.headline(result) == {"trl_speedup_short": 16.0}
    json.dumps(result)


def test_completions_of_another_length_are_no_comparison():
    turn = {**TURN, "seconds": 1.0}
    with pytest.raises(ValueError, match="expected completions of 48 tokens, but the means are"):
        speed.summary(SHORT, {"trl": [turn], "ours": [{**turn, "tokens": 31.5}]})
    free = replace(SHORT, exact=False)
    assert speed.summary(free, {"trl": [turn], "ours": [{**turn, "tokens": 31.5}]})["speedup"]["median"] == 1.0


def test_the_table_of_speeds(result):
    text = speed.table(result)
    assert "| grpo-lightning | 32.00 (16.00 to 32.00) | 2.0 (2.0 to 4.0) | 16.0 (8.0 to 16.0) | 2.0 GiB |" in text
    assert "| short | TRL | 6.00 | 3.00 |  |  | 23.00 |" in text
    assert "| short | bfloat16 | no | 2 | 16 | no | no | no | no | **31.0** |" in text
    assert "| short | bfloat16 | no | 1 | 16 | no | no | no | no | a/b |" in text


def test_pictures(result, tmp_path):
    speed.draw(result, tmp_path)
    curves = {
        "reward": {"trl": [0.1, 0.3], "ours": [0.1, 0.4]},
        "seconds": {"trl": [90.0, 80.0], "ours": [40.0, 10.0]},
        "samples_per_update": 128,
        "max_tokens": 20,
        "learning_rate": 2e-4,
    }
    learning.draw(curves, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"performance.png", "performance_learning.png"}
    assert "| grpo-lightning | 0.10 | 0.25 | 0.10 0.40 | 50 |" in learning.table(curves)


def test_gradients_are_compared_as_one_vector():
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    other = {"b": torch.tensor([[0.0]]), "a": torch.tensor([6.0, 0.0])}
    found = gradients.alike(one, other)
    assert found["cosine"] == pytest.approx(0.6)
    assert found["norm_ratio"] == pytest.approx(5 / 6)
    assert found["relative_difference"] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="on one side only: {'b'}"):
        gradients.alike(one, {"a": other["a"]})


def test_the_table_of_gradients():
    same = {"cosine": 1.0, "norm_ratio": 1.0, "relative_difference": 1e-6}
    less = {**same, "cosine": 0.99}
    case = {"between": {"float32": same, "bfloat16": less}, "rounding": {"trl": less, "ours": less}}
    result = {"cases": {"short": case, "long": {**case, "between": {"float32": less, "bfloat16": less}}}}
    assert "| short | here and TRL, float32 | 1.000000 | 1.0000 | 1.0e-06 |" in gradients.table(result)
    assert gradients.headline(result) == {"gradient_cosine_float32": 0.99, "gradient_cosine_bfloat16": 0.99}


def test_the_tokens_that_gradients_are_of(tiny_model):
    """Every part of the adapter has a gradient, few ratios are clipped, and none is 1."""
    from grpo_lightning import GRPOModule
    from grpo_lightning.rollout.packing import pack

    case = replace(SHORT, prompts=2, samples=3, tokens=5)
    prompts = [[5, 6, 7], [8, 9]]
    completions = [[[10 + i + j + k for k in range(5)] for j in range(3)] for i in range(2)]
    module = GRPOModule(tiny_model, dtype="float32")
    module.configure_model()
    gradients.randomise(module)
    rows = gradients.rows(prompts, completions, case)
    batch = gradients.old_and_advantages(module, pack(rows, 1.0), case)
    assert batch.target_ids.view(6, 5).tolist() == [ids for group in completions for ids in group]
    assert float(batch.loss_weight.sum()) == pytest.approx(1.0)
    assert len(set(batch.advantages.view(6, 5)[:, 0].tolist())) == 6
    with torch.no_grad():
        apart = module.policy.token_logprobs(batch).logprobs - batch.old_logprobs
    assert float(apart.abs().min()) > 0
    assert float(apart.abs().max()) < 0.2
    assert all(bool((tensor != 0).any()) for tensor in gradients.gradient(module, batch).values())


def test_this_projects_side_takes_turns(tiny_model, tmp_path):
    """With transformers in place of vLLM: exact lengths, phases, the reward, and an end after the last turn."""
    case = replace(SHORT, prompts=2, samples=2, tokens=3, reward="characters")
    asked = {
        "case": asdict(case),
        "model": tiny_model,
        "updates": 2,
        "tasks": [{"id": t.id, "messages": list(t.messages), "data": t.data} for t in tasks(case, 2, words)],
    }
    (tmp_path / "spec.json").write_text(json.dumps(asked))
    line = [sys.executable, "-m", "benchmarks.performance.trl.ours", str(tmp_path / "spec.json")]
    given = environment(ROOT, PERFORMANCE_ENGINE="transformers")
    with Side("ours", line, tmp_path / "log", tmp_path, given) as side:
        turns = [side.turn(), side.turn()]
        with pytest.raises(RuntimeError, match="ours ended with 0"):
            side.turn()
    for turn in turns:
        assert turn["tokens"] == 3
        assert set(turn["phases"]) == {"rollout", "train", "sync", "doctor"}
        assert 0 < sum(turn["phases"].values()) <= turn["seconds"]
    assert speed.summary(case, {"trl": turns, "ours": turns})["speedup"]["median"] == 1.0

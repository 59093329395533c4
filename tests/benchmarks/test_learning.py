"""The learning table: its pure parts, a run of two rollouts, and that what is committed fits the code and the page."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from doc_blocks import DOCS

from benchmarks.learning.algorithms import ALGORITHMS, PRESETS, SHARED, combined, overruled, own
from benchmarks.learning.exact import examine, rows, score
from benchmarks.learning.results import PICTURE, RESULT, area, collect, failed, idle, overlap, spread, summary
from benchmarks.learning.runs import EPOCHS, HELD_OUT, SEEDS, Store, origin, question
from benchmarks.learning.start import Start, make_start, wrong_answer
from benchmarks.learning.sums import EOS, IDS, VOCABULARY, Sums, answer, encode, prompt, right, split
from benchmarks.learning.text import markdown, paragraph, table
from benchmarks.marked import marks

V = len(VOCABULARY)


@pytest.fixture(scope="module")
def committed():
    if not RESULT.is_file():
        pytest.skip("no results yet")
    return json.loads(RESULT.read_text("utf-8"))


def made(after, *, before=0.3, fails=0):
    """A run of two rollouts."""
    return {
        "sampled": [before, (before + after) / 2, after],
        "greedy": [0.5, 0.5, 0.75],
        "entropy": [0.6, 0.5, 0.4],
        "clip_low": [0.1, 0.0],
        "clip_high": [0.1, 0.2],
        "cpu_seconds": 10.0,
        "findings": ["warn x: Y."] if fails else [],
        "verdicts": {"gradient": {"pass": 8 - fails, "fail": fails, "no_power": 3}},
    }


@pytest.fixture(scope="module")
def result():
    runs = {
        "grpo": [made(0.6), made(0.7), made(0.5)],
        "gspo": [made(0.31), made(0.29), made(0.3, fails=2)],
        "rloo": [made(0.8), made(0.66), made(0.7)],
    }
    runs["gspo"][0]["replaced"] = [4.0, 8.0]
    again = {name: made(0.44) for name in idle(runs)}
    return collect({"0.0001": made(0.45), "0.0003": runs["grpo"][0]}, runs, again, Path("nowhere"))


def test_the_split():
    train, held_out = split(500, 1)
    assert (len(train), len(held_out), len({*train, *held_out})) == (9500, 500, 10000)
    assert split(500, 1) == (train, held_out) != split(500, 2)


def test_a_task():
    task = Sums([(7, 95)])[0]
    assert (task.id, task.data["answer"]) == ("7+95=", "102")
    assert task.messages[0]["content"] == prompt((7, 95)) == "7+95="
    assert right("102", answer="102") == 1
    assert right("1020", answer="102") == right("", answer="102") == right("0102", answer="102") == 0


def test_wrong_answers_are_wrong():
    draw = random.Random(0)
    for pair in [(0, 0), (1, 0), (0, 5), (5, 5), (50, 49), (99, 99)] * 50:
        said = wrong_answer(pair, draw)
        assert said != answer(pair)
        assert said == str(int(said))


def test_rows_mark_the_answer_and_its_end():
    ids, marks = rows([("1+2=", "3"), ("10+2=", "12")])
    assert ids.tolist() == [[*encode("1+2=3"), IDS[EOS], 0, 0], [*encode("10+2=12"), IDS[EOS]]]
    assert marks.sum(1).tolist() == [2, 3]
    assert ids[marks].tolist() == [*encode("3"), IDS[EOS], *encode("12"), IDS[EOS]]


def test_the_score_by_hand():
    """Answer and end have probability 1/2 and 1/4 in the first row, and 1/V each in the second."""
    ids, marks = rows([("1+2=", "3"), ("1+3=", "4")])
    logits = torch.zeros(2, 6, V, dtype=torch.float64)
    for position, token, p in ((3, IDS["3"], 1 / 2), (4, IDS[EOS], 1 / 4)):
        logits[0, position] = math.log((1 - p) / (V - 1))
        logits[0, position, token] = math.log(p)
    found = score(logits, ids, marks)
    entropies = [-(p * math.log(p) + (1 - p) * math.log((1 - p) / (V - 1))) for p in (1 / 2, 1 / 4)]
    assert found.sampled == pytest.approx((1 / 8 + 1 / V**2) / 2)
    assert found.greedy == 0.5
    assert found.entropy == pytest.approx((sum(entropies) + 2 * math.log(V)) / 4)


def test_the_score_does_not_see_prompt_and_padding():
    ids, marks = rows([("1+2=", "3"), ("10+20=", "30")])
    logits = torch.randn(*ids.shape, V, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros_like(marks)
    seen[:, :-1] = marks[:, 1:]
    other = torch.where(seen[..., None], logits, torch.randn(*ids.shape, V))
    assert score(logits, ids, marks) == score(other, ids, marks)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_are_taken(name, tmp_path):
    """Each algorithm as this file has it makes a module and a data module."""
    from grpo_lightning import GRPOModule, RolloutDataModule, TransformersEngine

    settings = combined(own(name, tmp_path)[0])
    GRPOModule("nowhere", **settings["model"])
    RolloutDataModule(Sums([(1, 2)]), right, engine=TransformersEngine(), **settings["data"])
    assert {**settings["model"], **SHARED["model"]} == settings["model"]


def test_a_preset_wins_over_the_benchmark_and_what_is_shared_over_both(tmp_path):
    preset = {
        "model": {"clip_high": 0.3, "learning_rate": 1.0, "kl_coef": 0.0, "correction": None},
        "data": {"max_refills": 5, "inner_epochs": 1, "updates_per_rollout": 4},
        "trainer": {"max_epochs": 3},
    }
    (tmp_path / "dapo.yaml").write_text(yaml.safe_dump(preset))
    mine, source = own("dapo", tmp_path)
    assert source == "dapo.yaml"
    assert mine == {
        "model": {"clip_high": 0.3, "learning_rate": 1.0},
        "data": {"max_refills": 5, "inner_epochs": 1, "updates_per_rollout": 4},
    }
    settings = combined(mine)
    assert settings["model"] == {"clip_high": 0.3, **SHARED["model"]}
    assert settings["data"] == {"max_refills": 5, **SHARED["data"]}
    assert overruled(mine) == ["learning_rate", "inner_epochs", "updates_per_rollout"]
    assert own("grpo", tmp_path) == ({"model": {}, "data": {}}, "benchmark")
    with pytest.raises(ValueError, match="expected an algorithm of grpo, .* but got 'nothing'"):
        own("nothing", tmp_path)


def test_results_are_kept_by_question(tmp_path):
    store = Store(tmp_path / "deep")
    asked = question(combined({}), 1, 2)
    assert store.get("grpo-1", asked) is None
    store.add("grpo-1", asked, {"sampled": [0.5]})
    assert store.get("grpo-1", asked) == {"sampled": [0.5]}
    assert store.get("grpo-1", question(combined({}), 1, 3)) is None
    assert store.get("grpo-1", question(combined({"model": {"clip_high": 0.3}}), 1, 2)) is None


def test_area_and_spread():
    assert area([0.0, 1.0, 1.0]) == 0.75
    assert area([0.25] * 4) == 0.25
    assert spread([0.1, 0.4, 0.1]) == {"mean": 0.2, "min": 0.1, "max": 0.4}
    assert overlap(spread([0.1, 0.2]), spread([0.2, 0.3]))
    assert not overlap(spread([0.1, 0.2]), spread([0.21, 0.3]))


def test_the_summary_compares_seed_by_seed():
    numbers = summary([made(0.6, fails=1), made(0.4, fails=2)], [made(0.5), made(0.6)])
    assert numbers["after"] == {"mean": 0.5, "min": 0.4, "max": 0.6}
    assert numbers["after_less_reference"] == {"mean": -0.05, "min": -0.2, "max": 0.1}
    assert numbers["clipped"]["mean"] == pytest.approx(0.2)
    assert (numbers["failed_verdicts"], numbers["verdicts"]) == ({"gradient": 3}, 16)
    assert failed(made(0.5)) == {}


def test_the_table_is_sorted_and_complete(result):
    lines = table(result).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["rloo", "grpo", "gspo"]
    assert {line.count("|") for line in lines} == {12}
    assert "| 0.72 (0.66 to 0.80) | +0.120 (-0.040 to +0.200) |" in lines[2]
    assert lines[4].endswith("| gradient: 2 of 24 |")


def test_the_paragraph_says_what_the_numbers_say(result):
    text = paragraph(result)
    assert "`rloo` ends highest at 0.72 (0.66 to 0.80), `gspo` lowest at 0.30 (0.29 to 0.31)" in text
    assert "The spread of 1 of the 2 others overlaps with that of `rloo`" in text
    assert "the seeds of `grpo` alone differ by 0.20" in text
    assert (
        "`gspo` gained less than 0.05. Once more on seed 0 with a learning rate of 0.0001, where `grpo` ends at 0.45, "
        "they end at 0.44." in text
    )
    assert "took the gradient from 20% of the tokens (`grpo`: 20%), and it went from 0.30 to 0.30" in text
    assert "`gspo` replaced groups of equal rewards" in text
    assert "which take one" not in text
    assert '72 verdicts with power; 2 of them failed, of `gspo`: "warn x: Y."' in text


def test_a_start_and_a_run(tmp_path):
    """A start that need not be right, two rollouts on it; the exact accuracy is that of sampling."""
    from benchmarks.learning.run import train

    sums, held_out = split(20, 0)
    quick = Start(accuracy=0.0, batch=32, steps=5, every=5)
    for name in ("one", "two"):
        assert make_start(tmp_path / name, sums, held_out, 0, quick) == 5
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    settings = combined({"data": {}}, {**SHARED, "data": {**SHARED["data"], "prompts_per_rollout": 4}})
    found = train(settings, tmp_path / "one", sums, held_out, seed=0, epochs=2, folder=tmp_path)
    assert (found["updates"], len(found["sampled"]), len(found["clip_low"])) == (8, 3, 2)
    assert failed(found) == {}
    again = train(settings, tmp_path / "one", sums, held_out, seed=0, epochs=2, folder=tmp_path)
    assert again["sampled"] == found["sampled"]


def test_the_exact_accuracy_is_that_of_sampling(tmp_path):
    from transformers import AutoModelForCausalLM

    make_start(tmp_path / "model", [(1, 2), (20, 31)], [(1, 2)], 0, Start(accuracy=0.5, wrong=0.3, batch=32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = examine(model, [(1, 2)])
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        ids = torch.tensor([encode("1+2=")] * 4000)
        for _ in range(2):
            next_token = model(input_ids=ids).logits[:, -1].softmax(-1).multinomial(1)
            ids = torch.cat([ids, next_token], 1)
    share = float((ids[:, -2:] == torch.tensor([IDS["3"], IDS[EOS]])).all(1).double().mean())
    assert share == pytest.approx(found.sampled, abs=4 * math.sqrt(0.25 / 4000))


def test_what_is_committed_fits_the_code(committed):
    assert set(committed["algorithms"]) == set(ALGORITHMS)
    assert committed["origin"] == json.loads(json.dumps(origin()))
    assert (committed["epochs"], committed["seeds"], committed["origin"]["held_out"]) == (EPOCHS, [*SEEDS], HELD_OUT)
    assert committed["shared"] == SHARED
    for found in committed["algorithms"].values():
        assert [len(run["sampled"]) for run in found["runs"]] == [EPOCHS + 1] * len(SEEDS)
        before = [run["sampled"][0] for run in found["runs"]]
        assert before == [run["sampled"][0] for run in committed["algorithms"]["grpo"]["runs"]]
    assert PICTURE.is_file()


def test_the_page_shows_what_is_committed(committed):
    page = DOCS / "algorithms.md"
    if not page.is_file() or marks("learning")[0] not in page.read_text("utf-8"):
        pytest.skip("the page has no place for it")
    assert markdown(committed) in page.read_text("utf-8")


def test_presets_that_the_table_shows_are_those_of_the_project(committed):
    """A preset that has changed since asks for the runs anew."""
    if not PRESETS.is_dir():
        pytest.skip("no presets here")
    for name, found in committed["algorithms"].items():
        if found["settings_from"] == f"{name}.yaml":
            assert found["settings"] == json.loads(json.dumps(own(name, PRESETS)[0]))

"""The performance benchmark: turns, statistics, what is stored, and that the page says what is stored."""

import asyncio
import json
import sys
import time
from types import SimpleNamespace

import pytest
from doc_blocks import DOCS

from benchmarks.marked import marks
from benchmarks.performance import __main__ as command
from benchmarks.performance import start, sync, targets
from benchmarks.performance.__main__ import SECTIONS, main
from benchmarks.performance.machine import machine, matmul_rates
from benchmarks.performance.page import IMAGES, PAGE, written
from benchmarks.performance.paired import alternate, ratio, shown, spread
from benchmarks.performance.stored import RESULT, ROOT, headlines, load, merged
from benchmarks.performance.turns import Side, TimeIsUp, environment

MACHINE = {
    "cores": 2,
    "processor": "Some Processor",
    "memory_gib": 23.5,
    "python": "3.11.4",
    "versions": {"torch": "2.13.0"},
    "matmul_tflops": {"threads": 2.0, "bfloat16 [1,2]x[2,3]": 0.5},
    "tmpfs": True,
}


@pytest.fixture(scope="module")
def committed():
    if not RESULT.is_file():
        pytest.skip("no results yet")
    return json.loads(RESULT.read_text("utf-8"))


def fake(number, *, fails=False):
    """A section whose number is known."""

    def measure(size):
        if fails:
            raise RuntimeError("no such engine")
        return {"number": number, "size": size}

    return SimpleNamespace(
        measure=measure,
        table=lambda result: f"number {result['number']}",
        headline=lambda result: {f"key_{number}": result["number"]},
    )


def test_sides_take_turns():
    calls, told = [], []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    found = alternate(sides, 3, warmups=2, tell=lambda *what: told.append(what))
    assert "".join(calls) == "ab" * 5
    assert found == {"a": [5, 7, 9], "b": [6, 8, 10]}
    assert told[:3] == [("a", -2, 1), ("b", -2, 2), ("a", -1, 3)]
    with pytest.raises(ValueError, match="expected at least two sides and a pair, but got 1 sides"):
        alternate({"a": lambda: 0}, 3)
    with pytest.raises(ValueError, match="0 pairs"):
        alternate(sides, 0)


def test_the_ratio_is_that_of_neighbours():
    """Not that of the medians, which is 2 here."""
    assert ratio([1.0, 4.0, 100.0], [1.0, 2.0, 10.0]) == {"median": 2.0, "min": 1.0, "max": 10.0}
    assert ratio([3.0, 2.0, 9.0], [1.0, 2.0, 3.0])["median"] == 3.0
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])
    assert shown(spread([1.5, 2.5])) == "2.00 (1.50 to 2.50)"


def test_results_are_merged_by_section():
    sections = {"one": fake(1), "two": fake(2)}
    stored = merged({"sections": {}}, "two", {"result": {"number": 2}}, sections)
    stored = merged(stored, "one", {"result": {"number": 1}}, sections)
    assert list(stored) == ["key_1", "key_2", "sections"]
    assert list(stored["sections"]) == ["one", "two"]
    again = merged(stored, "two", {"result": {"number": 5}}, sections)
    assert (again["key_1"], again["key_2"]) == (1, 5)
    assert "key_2" in stored


def test_numbers_of_a_section_that_is_gone_are_dropped():
    stored = merged(
        {"old_key": 3, "sections": {"gone": {"result": {}}}}, "one", {"result": {"number": 1}}, {"one": fake(1)}
    )
    assert stored == {"key_1": 1.0, "sections": {"one": {"result": {"number": 1}}, "gone": {"result": {}}}}


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    target = tmp_path / "results.json"
    monkeypatch.setattr(command, "machine", lambda: MACHINE)
    monkeypatch.setattr(command, "SECTIONS", {"one": fake(1), "two": fake(2), "three": fake(3)})
    main(["two", "--json", str(target)])
    before = load(target)["sections"]["two"]
    monkeypatch.setattr(command, "SECTIONS", {"one": fake(1), "two": fake(2, fails=True), "three": fake(3)})
    with pytest.raises(SystemExit, match="two failed: RuntimeError: no such engine"):
        main(["--json", str(target)])
    found = load(target)
    assert list(found["sections"]) == ["one", "two", "three"]
    assert found["sections"]["two"] == before
    assert (before["size"], before["machine"]) == ("full", MACHINE)
    assert "Traceback" in capsys.readouterr().err


def test_a_try_out_leaves_the_page_alone(tmp_path, monkeypatch, capsys):
    page = PAGE.read_text("utf-8")
    monkeypatch.setattr(command, "machine", lambda: MACHINE)
    monkeypatch.setattr(command, "SECTIONS", {"trl": fake(7)})
    monkeypatch.setattr(command, "SMOKE", tmp_path / "smoke.json")
    main(["trl", "--size", "smoke"])
    assert load(tmp_path / "smoke.json")["sections"]["trl"]["result"] == {"number": 7, "size": "smoke"}
    assert "number 7" in (tmp_path / "smoke.md").read_text("utf-8")
    assert PAGE.read_text("utf-8") == page


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["rollout"])
    assert "expected write or sections of trl, " in capsys.readouterr().err


def test_the_page_is_made_of_what_is_stored():
    sections = {"one": fake(1), "two": fake(2)}
    page = "".join("{}\n{}\n".format(*marks(f"performance:{name}")) for name in ("targets", "one", "two"))
    assert written(page, {"sections": {}}, sections) == page
    entry = {"machine": MACHINE, "seconds": 125.0, "result": {"number": 1}}
    text = written(page, {"sections": {"one": entry}}, sections)
    assert "number 1\n\n*2 cores of Some Processor, 23.5 GiB; Python 3.11.4, torch 2.13.0." in text
    assert "TFLOP/s before the section ran: bfloat16 [1,2]x[2,3] 0.50. 2 minutes.*" in text
    assert "not measured" in text
    assert written(text, {"sections": {"one": entry}}, sections) == text


def test_targets():
    rows = targets.table({"trl_speedup_short": 8.0, "sync_milliseconds": 151.2}).splitlines()
    assert len(rows) == 2 + len(targets.TARGETS)
    assert rows[2].endswith("| `trl_speedup_short` | at least 8 | 8.0 | yes |")
    assert next(row for row in rows if "sync" in row).endswith("| at most 150 | 151 | no |")
    assert rows[3].endswith("| at least 15 | not measured |  |")


def test_the_machine(monkeypatch):
    monkeypatch.setattr("benchmarks.performance.machine.matmul_rates", lambda: {"threads": 1.0})
    found = machine()
    assert found["memory_gib"] > 0.5
    assert "torch" in found["versions"]
    assert json.loads(json.dumps(found)) == found
    rates = matmul_rates(1)
    assert sum(name.startswith("bfloat16") for name in rates) == 2
    assert min(rates.values()) > 0


CHILD = """
import sys, time
from benchmarks.performance.turns import Turns, spec
turns = Turns()
print("a library says something")
for number in range(spec()["turns"]):
    turns.wait()
    if number == 2:
        time.sleep(30)
    turns.note({"number": number})
turns.finish()
"""


def child(tmp_path, source=CHILD, turns=3):
    (tmp_path / "spec.json").write_text(json.dumps({"turns": turns}))
    command_line = [sys.executable, "-c", source, str(tmp_path / "spec.json")]
    return Side("child", command_line, tmp_path / "log", tmp_path, environment(ROOT))


def test_a_process_works_when_it_is_told_to(tmp_path):
    with child(tmp_path, turns=2) as side:
        side.ready()
        side.ready()
        found = [side.turn(60) for _ in range(2)]
        with pytest.raises(RuntimeError, match="child ended with 0"):
            side.turn(60)
    assert [turn["number"] for turn in found] == [0, 1]
    assert all(turn["seconds"] > 0 for turn in found)
    assert (tmp_path / "log").read_text() == "a library says something\n"


def test_a_turn_that_takes_too_long_is_stopped(tmp_path):
    with child(tmp_path) as side:
        side.turn()
        side.turn()
        with pytest.raises(TimeIsUp, match="child: nothing within"):
            side.turn(0.2)
        begin = time.monotonic()
        side.__exit__(TimeIsUp, TimeIsUp(), None)
    assert time.monotonic() - begin < 20
    assert side._process.poll() is not None


def test_a_process_that_fails_shows_what_it_said(tmp_path):
    source = "raise ValueError('no such model')"
    with (
        child(tmp_path, source) as side,
        pytest.raises(RuntimeError, match="(?s)ended with 1.*ValueError: no such model"),
    ):
        side.ready()


def test_the_environment_of_what_is_measured(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in environment(ROOT)
    assert environment(ROOT, OMP_NUM_THREADS="2", HOME=None)["OMP_NUM_THREADS"] == "2"
    assert "HOME" not in environment(ROOT, HOME=None)


def test_waiting_for_what_a_process_says(tmp_path):
    says = 'import json, time; print("noise"); print("[1]"); print(json.dumps({"ready": time.monotonic(), "x": 1}))'
    found = start.wait_for([sys.executable, "-c", says + "; time.sleep(60)"], ["ready"], tmp_path)
    assert set(found) == {"ready"}
    assert 0 < found["ready"] < 30
    with pytest.raises(RuntimeError, match="(?s)expected ready of .* it said.*no vLLM here"):
        start.wait_for([sys.executable, "-c", "raise SystemExit('no vLLM here')"], ["ready"], tmp_path)


def test_the_bare_engine_is_the_same_engine(monkeypatch, tmp_path):
    """vLLM gets the arguments that `VLLMEngine` would give it for the demo's configuration."""
    import contextlib

    import torch
    import yaml

    from benchmarks.performance import bare_engine
    from grpo_lightning import VLLMEngine
    from grpo_lightning.rollout.engine import EngineSpec

    given = []
    engines = SimpleNamespace(AsyncLLM=SimpleNamespace(from_engine_args=lambda args: SimpleNamespace(shutdown=int)))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(AsyncEngineArgs=lambda **settings: given.append(settings)))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.async_llm", engines)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = yaml.safe_load((ROOT / "configs" / "demo_cpu.yaml").read_text())["data"]
    longest = data["max_prompt_tokens"] + data["max_tokens"]
    spec = EngineSpec("model", 16, longest, data["prompts_per_rollout"] * data["samples_per_prompt"])
    ours = VLLMEngine(**data["engine"]["init_args"])
    asyncio.run(ours._start(spec, SimpleNamespace(starting=lambda environment: contextlib.nullcontext())))
    asyncio.run(bare_engine.start("model"))
    assert given[0] == given[1]


def test_the_clock_tells_the_doctors_tokens_from_a_tasks(capsys):
    from benchmarks.performance.first_token import Clock

    clock = Clock()

    async def play():
        clock.sampled()

    print("a progress bar", end="")
    clock.sampled()
    asyncio.run(clock.watch(play)())
    clock.sampled()
    asyncio.run(clock.watch(play)())
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [list(one) for one in said] == [["any"], ["task"]]
    assert said[0]["any"] <= said[1]["task"]


def test_the_table_of_starts():
    result = {
        "engine": "vllm",
        "seconds": {
            "fit to a task's first token": [60.0, 62.0, 61.0],
            "fit to any first token": [40.0, 41.0, 42.0],
            "bare engine": [30.0, 31.0, 32.0],
            "bare model": [9.0, 10.0, 11.0],
        },
        "ratio": {"median": 1.5, "min": 1.4, "max": 1.6},
        "ratio_any": {"median": 1.0, "min": 0.9, "max": 1.1},
        "commands": {"import": [0.3, 0.2, 0.4], "help": [0.25], "python": [0.02]},
    }
    text = start.table(result)
    assert "| fit to a task's first token | 61.0 (60.0 to 62.0) |" in text
    assert "one after the other: 1.50 (1.40 to 1.60); to the first" in text
    assert start.headline(result) == {
        "start_ratio": 1.5,
        "start_ratio_any": 1.0,
        "import_seconds": 0.3,
        "help_seconds": 0.25,
    }


def test_the_table_of_publications():
    parts = {"total": [100.0, 120.0, 110.0], "write": [40.0] * 3, "load": [70.0] * 3, "answer": [9.0] * 3}
    result = {
        "engine": "vllm",
        "ranks": {"8": {**parts, "total": [90.0]}, "16": parts},
        "models": {"8B": {"bytes": 167_772_160, "write": [200.0]}},
    }
    text = sync.table(result)
    assert "| 16 | 110 (100 to 120) | 40 (40 to 40) | 70 (70 to 70) | 9 (9 to 9) |" in text
    assert "| 8B | 160 MiB | 200 (200 to 200) |" in text
    assert sync.headline(result) == {"sync_milliseconds": 110.0}
    assert sync._size(2**20 * 18.6) == "18.6 MiB"
    assert sync._size(2**30) == "1024 MiB"


def test_the_adapters_that_are_only_written_have_the_shapes_of_real_ones(tiny_model):
    from grpo_lightning.loading import load_policy

    policy = load_policy(tiny_model, dtype="float32", lora_rank=4)
    found = {
        name.split("layers.0.")[1].split(".lora_")[0]: {}
        for name in policy.trainable_parameters()
        if "layers.0." in name
    }
    for name, parameter in policy.trainable_parameters().items():
        if "layers.0." in name:
            found[name.split("layers.0.")[1].split(".lora_")[0]]["A" if "lora_A" in name else "B"] = parameter.shape
    expected = {
        name: {"A": (4, inputs), "B": (outputs, 4)}
        for name, (inputs, outputs) in sync.shapes(policy.causal_lm.config).items()
    }
    assert found == expected


def test_publications_are_timed(tiny_model, monkeypatch):
    monkeypatch.setenv("PERFORMANCE_ENGINE", "transformers")
    found = sync.publications(tiny_model, 4, 2)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
        ("total", "write", "load", "answer"), 2
    )
    for total, write, load_ in zip(found["total"], found["write"], found["load"], strict=True):
        assert total == pytest.approx(write + load_, abs=0.02)


def test_every_section_has_its_place_on_the_page():
    page = PAGE.read_text("utf-8")
    for name in ("targets", *SECTIONS):
        first, last = marks(f"performance:{name}")
        assert page.count(first) == page.count(last) == 1, name
        assert page.index(first) < page.index(last)


def test_the_page_shows_what_is_committed(committed):
    page = PAGE.read_text("utf-8")
    assert written(page, committed, SECTIONS) == page
    shown_images = [part.split(")")[0] for part in page.split("](images/")[1:]]
    assert all((IMAGES / name).is_file() for name in shown_images)
    assert PAGE.parent == DOCS


def test_single_numbers_follow_from_the_sections(committed):
    assert {k: v for k, v in committed.items() if k != "sections"} == headlines(committed["sections"], SECTIONS)
    assert all(entry["size"] == "full" for entry in committed["sections"].values())


def test_no_machine_is_named(committed):
    import socket

    assert socket.gethostname() not in json.dumps(committed)
    assert str(ROOT) not in json.dumps(committed)

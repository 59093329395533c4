"""What surrounds the engine's processes, with processes that do not import vLLM."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from asyncio import CancelledError
from concurrent.futures import Future
from pathlib import Path

import pytest

from grpo_lightning.rollout.vllm_plugin import ENABLE_ENV
from grpo_lightning.rollout.vllm_process import (
    EngineProcesses,
    changed_environment,
    engine_environment,
    meaningful_lines,
)

spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def processes():
    processes = EngineProcesses()
    yield processes
    processes._told = False
    processes.discard_log()


class TestLog:
    def test_takes_what_the_processes_print(self, processes, capfd):
        with processes.starting(dict):
            process = spawn.Process(target=os.system, args=("echo from outside; echo to stderr >&2",))
            process.start()
            other = spawn.Process(target=int, args=("no number",))
            other.start()
            process.join()
            other.join()
        words = processes.last_words()
        assert words.startswith("Its log ends with:\n  ")
        for line in ("from outside", "to stderr", "ValueError: invalid literal for int() with base 10: 'no number'"):
            assert f"  {line}\n" in words
        assert Path(words.rsplit("The whole log: ", 1)[1]).is_file()
        assert capfd.readouterr().err == ""

    def test_is_kept_only_if_a_message_names_it(self):
        for told in (False, True):
            processes = EngineProcesses()
            processes._log.write_text("a line")
            if told:
                processes.last_words()
            processes.discard_log()
            assert processes._log.exists() is told
        processes._log.unlink()

    def test_says_that_it_is_empty(self, processes):
        assert processes.last_words() == "It logged nothing."

    def test_ends_with_what_matters(self):
        log = """
W1122 16:15:22.272000 14203 torch/_library/triton.py:53] Triton not available
(EngineCore pid=7) ERROR 11-22 16:12:18 [core.py:95] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-22 16:12:18 [core.py:95] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 16:12:18 [core.py:95]   File "core.py", line 7, in f
(EngineCore pid=7) ERROR 11-22 16:12:18 [core.py:95]     g()
(EngineCore pid=7) ERROR 11-22 16:12:18 [core.py:95]     ^^^
(EngineCore pid=7) ERROR 11-22 16:12:18 [core.py:95] ValueError: No available memory for the cache blocks.
(EngineCore pid=7) ERROR 11-22 16:12:18 [core.py:95]
Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 7, in f
ValueError: No available memory for the cache blocks.
"""
        assert meaningful_lines(log) == [
            "EngineCore failed to start.",
            "ValueError: No available memory for the cache blocks.",
            "Process EngineCore:",
        ]
        assert meaningful_lines("\n".join(map(str, range(30)))) == [str(i) for i in range(10, 30)]


SCRIPT = """
import multiprocessing, threading
from grpo_lightning.rollout.vllm_process import EngineProcesses

print("main ran", flush=True)
processes = EngineProcesses()
with processes.starting(dict):
    process = multiprocessing.get_context("spawn").Process(target=print, args=("child ran",))
    process.start()
    process.join()
print(processes.last_words(), flush=True)
processes._told = False
processes.discard_log()
"""


def test_processes_do_not_run_the_users_script_again(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.count("main ran") == 1
    assert "  child ran\n" in result.stdout


class TestEnd:
    def start(self, processes, body):
        future = Future()

        def run():
            try:
                with processes.starting(dict):
                    future.set_result(body())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def test_kills_what_is_starting_and_nothing_else(self):
        mine = spawn.Process(target=time.sleep, args=(60,), name="EngineCore")
        mine.start()
        processes = EngineProcesses()
        children = []

        def body():
            child = spawn.Process(target=time.sleep, args=(60,), name="EngineCore")
            child.start()
            children.append(child)
            child.join()

        starting = self.start(processes, body)
        while not children:
            time.sleep(0.01)
        begin = time.monotonic()
        processes.end(starting)
        assert time.monotonic() - begin < 1
        assert starting.done()
        assert children[0].exitcode == -9
        assert mine.is_alive()
        mine.kill()
        mine.join()
        processes.discard_log()

    def test_a_start_that_is_not_there_yet_gets_no_process(self, processes):
        release = threading.Event()

        def body():
            release.wait(30)
            spawn.Process(target=time.sleep, args=(60,)).start()

        starting = self.start(processes, body)
        begin = time.monotonic()
        processes.end(starting)
        assert 1 < time.monotonic() - begin < 4
        assert not starting.done()
        release.set()
        with pytest.raises(CancelledError):
            starting.result(timeout=10)
        assert not multiprocessing.active_children()


class TestEnvironment:
    def test_is_the_engines_while_it_starts_and_the_users_afterwards(self, monkeypatch):
        monkeypatch.setenv("GIVEN", "before")
        monkeypatch.setenv("VLLM_CHANGED", "before")
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        before = dict(os.environ)
        with changed_environment({"GIVEN": "ours", "NEW": "ours"}):
            assert (os.environ["GIVEN"], os.environ["NEW"]) == ("ours", "ours")
            # As vLLM does.
            os.environ["VLLM_CHANGED"] = os.environ["VLLM_NEW"] = os.environ["OMP_NUM_THREADS"] = "vllm"
            del os.environ["NEW"]
        assert dict(os.environ) == before

    def test_leaves_what_other_threads_change(self, monkeypatch):
        monkeypatch.setenv("THEIRS", "before")
        monkeypatch.setenv("REMOVED", "before")
        monkeypatch.setenv("ADDED", "")
        with changed_environment({"OURS": "1"}):
            os.environ["THEIRS"] = os.environ["ADDED"] = "during"
            del os.environ["REMOVED"]
        assert os.environ["THEIRS"] == os.environ["ADDED"] == "during"
        assert "REMOVED" not in os.environ
        assert "OURS" not in os.environ

    def test_a_second_start_waits_and_does_not_see_the_firsts(self, processes):
        seen = []
        first_in, release = threading.Event(), threading.Event()

        def first():
            with processes.starting(lambda: {"VLLM_OF_THE_FIRST": "1"}):
                first_in.set()
                release.wait(30)

        def second():
            with processes.starting(lambda: {"SEEN": os.environ.get("VLLM_OF_THE_FIRST", "nothing")}):
                seen.append(os.environ["SEEN"])

        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        threads[0].start()
        first_in.wait(30)
        threads[1].start()
        time.sleep(0.1)
        assert not seen
        release.set()
        for thread in threads:
            thread.join(30)
        assert seen == ["nothing"]

    def test_general_settings_give_way_to_what_the_user_has_set(self, monkeypatch):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        monkeypatch.setenv("LD_PRELOAD", "/mine.so")
        values = engine_environment(False, None, None, 1)
        assert values["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert values["LD_PRELOAD"].endswith("/mine.so")
        assert values[ENABLE_ENV] == str(os.getpid())

    def test_arguments_win_over_the_environment_and_that_over_defaults(self, monkeypatch):
        names = ("VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "VLLM_ENGINE_READY_TIMEOUT_S")

        def values(*arguments):
            environment = engine_environment(False, *arguments)
            return [environment[name] for name in names]

        for name in names:
            monkeypatch.setenv(name, "1")
        assert values(3, 5, 59.5) == ["3", "5", "60"]
        assert values(None, None, 600.0) == ["1", "1", "600"]
        for name in names:
            monkeypatch.delenv(name)
        assert values(3, 5, 59.5) == ["3", "5", "60"]
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 7}, raising=False)
        assert values(None, None, 600.0) == ["2", "3", "600"]

    def test_cores_are_counted_without_affinity_too(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 6)
        assert engine_environment(False, None, None, 1)["OMP_NUM_THREADS"] == "6"

    def test_a_gpu_needs_nothing_of_the_cpus(self):
        of_cpus = {"LD_PRELOAD", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE"}
        assert not of_cpus & engine_environment(True, 3, 5, 59.5).keys()

import json
import re

import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import JsonlTasks


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="tasks.jsonl"):
        path = tmp_path / name
        text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_blank_lines_are_skipped(write):
    tasks = JsonlTasks(write("", {"prompt": "a"}, "   ", {"prompt": "b"}, ""))
    assert [(t.id, t.messages[0]["content"]) for t in tasks] == [("1", "a"), ("2", "b")]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c"])
def test_only_a_newline_ends_a_line(write, separator):
    (task,) = JsonlTasks(write(f'{{"prompt": "a{separator}b"}}' if separator != "\x0c" else {"prompt": "a\x0cb"}))
    assert task.messages[0]["content"] == f"a{separator}b"


def test_windows_line_ends_are_no_content(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [t.messages[0]["content"] for t in JsonlTasks(path)] == ["a", "b"]


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(
        ConfigurationError, match=re.escape(f"expected a JSON Lines file, but there is none at {tmp_path}")
    ):
        JsonlTasks(tmp_path)


@pytest.mark.parametrize("lines", [[], ["", "  ", "\t"]])
def test_empty_file_is_refused(write, lines):
    path = write(*lines)
    with pytest.raises(ConfigurationError, match=re.escape(f"{path} is empty")):
        JsonlTasks(path)


def test_invalid_json_names_file_and_line(write):
    path = write({"prompt": "a"}, "", '{"prompt": "b"')
    with pytest.raises(ConfigurationError, match=re.escape(f"{path}, line 3: ") + ".*invalid JSON.*delimiter"):
        JsonlTasks(path)


def test_a_field_that_one_line_lacks_names_this_line(write):
    path = write({"prompt": "a", "answer": "1"}, "", {"prompt": "b", "anwser": "2"})
    message = (
        f"{path}, line 3: expected the column 'answer', but the columns are 'anwser', 'prompt'. Did you mean 'anwser'?"
    )
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        JsonlTasks(path, columns={"answer": "answer"})


@pytest.mark.parametrize(("record", "kind"), [([1], "list"), ("prompt", "str"), (3, "int"), (None, "NoneType")])
def test_line_that_is_no_object_is_refused(write, record, kind):
    with pytest.raises(ConfigurationError, match=f"line 1: expected a JSON object, but got {kind}"):
        JsonlTasks(write(json.dumps(record)))


@pytest.mark.parametrize("prompt", [{}, [{"role": "user", "content": "a"}, "x"], True])
def test_prompts_that_only_json_can_hold_are_refused(write, prompt):
    with pytest.raises(ConfigurationError, match="line 1: expected 'prompt' to be a string or a list of chat messages"):
        JsonlTasks(write({"prompt": prompt}))


def test_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "Größe"}\n'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=re.escape(f"expected UTF-8, but {path} is not")):
        JsonlTasks(path)

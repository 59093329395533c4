import json
import re

import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import JsonlTasks, TaskSource


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="tasks.jsonl"):
        path = tmp_path / name
        text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_string_prompt_becomes_a_user_message_and_the_rest_data(write):
    path = write({"prompt": "2+2?", "id": "first", "answer": "4", "level": 3}, {"prompt": "ü?", "answer": None})
    tasks = JsonlTasks(path)
    assert isinstance(tasks, TaskSource)
    assert len(tasks) == 2
    assert tasks[0].id == "first"
    assert tasks[0].messages == ({"role": "user", "content": "2+2?"},)
    assert tasks[0].data == {"answer": "4", "level": 3}
    assert tasks[1].id == "2"
    assert tasks[1].messages == ({"role": "user", "content": "ü?"},)
    assert tasks[1].data == {"answer": None}


def test_path_may_be_a_string(write):
    assert len(JsonlTasks(str(write({"prompt": "a"})))) == 1


def test_messages_are_kept_and_the_system_prompt_comes_first(write):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = write({"prompt": messages}, {"prompt": "plain"})
    tasks = JsonlTasks(path, system_prompt="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert tasks[0].messages == (system, *messages)
    assert tasks[1].messages == (system, {"role": "user", "content": "plain"})
    assert JsonlTasks(path)[0].messages == tuple(messages)


def test_fields_can_have_other_names(write):
    tasks = JsonlTasks(
        write({"question": "q", "key": 7, "id": "x", "prompt": "p"}), prompt_field="question", id_field="key"
    )
    assert tasks[0].id == "7"
    assert tasks[0].messages == ({"role": "user", "content": "q"},)
    assert tasks[0].data == {"id": "x", "prompt": "p"}


def test_blank_lines_are_skipped_and_ids_are_line_numbers(write):
    tasks = JsonlTasks(write("", {"prompt": "a"}, "   ", {"prompt": "b"}, ""))
    assert [t.id for t in tasks] == ["2", "4"]
    with pytest.raises(IndexError):
        tasks[2]


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "nowhere.jsonl"
    with pytest.raises(ConfigurationError, match=re.escape(f"there is none at {path}")):
        JsonlTasks(path)
    with pytest.raises(ConfigurationError, match=re.escape(str(tmp_path))):
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


def test_missing_field_names_what_was_found(write):
    path = write({"prompt": "a"}, {"question": "b", "answer": "c"})
    pattern = re.escape(f"{path}, line 2: expected an object with the field 'prompt', but got ['answer', 'question']")
    with pytest.raises(ConfigurationError, match=pattern):
        JsonlTasks(path)


@pytest.mark.parametrize(("record", "kind"), [([1], "list"), ("prompt", "str"), (3, "int"), (None, "NoneType")])
def test_line_that_is_no_object_is_refused(write, record, kind):
    with pytest.raises(ConfigurationError, match=f"line 1: expected an object .* but got {kind}"):
        JsonlTasks(write(json.dumps(record)))


@pytest.mark.parametrize("prompt", [None, 5, [], {}, ["hello"], [{"content": "no role"}], [{"role": "user"}, "x"]])
def test_prompt_of_the_wrong_kind_is_refused(write, prompt):
    with pytest.raises(ConfigurationError, match="line 1: expected 'prompt' to be a string or a list of chat messages"):
        JsonlTasks(write({"prompt": prompt}))


def test_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "Größe"}\n'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=re.escape(str(path))):
        JsonlTasks(path)


def test_null_id_counts_as_absent(write):
    tasks = JsonlTasks(write({"prompt": "a", "id": None}, {"prompt": "b", "id": None}))
    assert [t.id for t in tasks] == ["1", "2"]


def test_ids_are_unique(write):
    # Seeds, completions.jsonl and error messages tell tasks apart by their ids alone.
    path = write({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}, {"prompt": "c", "id": "x"})
    with pytest.raises(ConfigurationError, match="'x'"):
        JsonlTasks(path)

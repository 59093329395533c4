"""What all sources that read files share, on each of them."""

import json
import re
from dataclasses import dataclass

import pyarrow
import pytest
from pyarrow.parquet import write_table

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import DatasetTasks, JsonlTasks, ParquetTasks, TaskSource

CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


@dataclass
class Source:
    """Writes records in one format and opens them."""

    kind: str
    path: object

    def write(self, *records):
        if self.kind == "jsonl":
            self.path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        elif self.kind == "parquet":
            write_table(pyarrow.Table.from_pylist(list(records)), self.path)
        else:
            pytest.importorskip("datasets").Dataset.from_list(list(records)).save_to_disk(self.path)
        return self.path

    def __call__(self, *records, **settings):
        classes = {"jsonl": JsonlTasks, "parquet": ParquetTasks, "dataset": DatasetTasks}
        return classes[self.kind](self.write(*records), **settings)

    def where(self, number):
        return f"{self.path}, {'line' if self.kind == 'jsonl' else 'row'} {number}"


@pytest.fixture(params=["jsonl", "parquet", "dataset"])
def source(request, tmp_path):
    return Source(request.param, tmp_path / f"tasks.{request.param}")


def test_string_prompt_becomes_a_user_message_and_the_rest_data(source):
    tasks = source(
        {"prompt": "2+2?", "id": "first", "answer": "4", "level": 3},
        {"prompt": "ü?", "id": None, "answer": None, "level": 4},
    )
    assert isinstance(tasks, TaskSource)
    assert len(tasks) == 2
    assert tasks[0].id == "first"
    assert tasks[0].messages == ({"role": "user", "content": "2+2?"},)
    assert tasks[0].data == {"answer": "4", "level": 3}
    assert tasks[1].id == "2"
    assert tasks[1].messages == ({"role": "user", "content": "ü?"},)
    assert tasks[1].data == {"answer": None, "level": 4}


def test_path_may_be_a_string(source):
    path = str(source.write({"prompt": "a"}))
    assert len(type(source({"prompt": "a"}))(path)) == 1


def test_ids_are_positions_unless_given(source):
    assert [t.id for t in source({"prompt": "a"}, {"prompt": "b"})] == ["1", "2"]


@pytest.mark.parametrize("index", [-1, 2, 10])
def test_index_outside_is_refused(source, index):
    with pytest.raises(IndexError):
        source({"prompt": "a"}, {"prompt": "b"})[index]


def test_messages_are_kept(source):
    conversation = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    assert source({"prompt": conversation})[0].messages == tuple(conversation)


def test_fields_that_only_other_messages_have_are_absent(source):
    # Columnar files fill them with None, which chat templates take for a value.
    call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    (task,) = source({"prompt": [{"role": "user", "content": "a"}, call]})
    assert task.messages == ({"role": "user", "content": "a"}, call)


def test_values_may_come_from_columns_of_other_names(source):
    record = {"question": "q", "uid": 7, "solution": "s", "extra": [1, 2]}
    (task,) = source(record, columns={"prompt": "question", "id": "uid", "answer": "solution"})
    assert task.id == "7"
    assert task.messages == ({"role": "user", "content": "q"},)
    assert task.data == {"answer": "s", "extra": [1, 2]}


def test_a_mapped_name_hides_the_column_of_that_name(source):
    record = {"prompt": "p", "id": "x", "question": "q", "answer": "long", "final": "short"}
    (task,) = source(record, columns={"prompt": "question", "answer": "final"})
    assert (task.id, task.messages[0]["content"], dict(task.data)) == ("x", "q", {"answer": "short"})


def test_two_names_may_share_a_column(source):
    (task,) = source({"prompt": "p", "text": "t"}, columns={"answer": "text", "reference": "text"})
    assert task.data == {"answer": "t", "reference": "t"}


def test_missing_prompt_names_file_and_columns(source):
    message = f"{source.where(1)}: expected the column 'prompt', but the columns are 'answer', 'prompts'. "
    with pytest.raises(ConfigurationError, match=re.escape(message + "Did you mean 'prompts'? Name the right one")):
        source({"prompts": "p", "answer": "a"})


def test_missing_mapped_column_names_what_asked_for_it(source):
    message = (
        f"{source.where(1)}: expected the column 'solutoin' for 'answer', but the columns are 'prompt', 'solution'. "
        "Did you mean 'solution'? Name the right one with columns={'answer': ...}"
    )
    with pytest.raises(ConfigurationError, match=re.escape(message) + "$"):
        source({"prompt": "p", "solution": "a"}, columns={"answer": "solutoin"})


def test_nothing_similar_is_not_suggested(source):
    with pytest.raises(ConfigurationError, match=r"the columns are 'prompt', 'x'\. Name the right one"):
        source({"prompt": "p", "x": 1}, columns={"answer": "solution"})


def test_an_id_that_was_asked_for_must_be_there(source):
    with pytest.raises(ConfigurationError, match="expected the column 'uid' for 'id'"):
        source({"prompt": "p"}, columns={"id": "uid"})


@pytest.mark.parametrize(
    "prompt",
    [None, 5, [], ["hello"], [{"content": "no role"}], [{"role": "user"}], [{"role": None, "content": "a"}]],
    ids=repr,
)
def test_prompt_of_the_wrong_kind_is_refused(source, prompt):
    message = (
        f"{source.where(1)}: expected 'prompt' to be a string or a list of chat messages, each with role and content"
    )
    with pytest.raises(ConfigurationError, match=re.escape(message) + ", but got "):
        source({"prompt": prompt})


def test_null_prompt_among_others_is_refused(source):
    with pytest.raises(ConfigurationError, match=re.escape(f"{source.where(3)}: ") + ".* but got None"):
        source({"prompt": "a"}, {"prompt": "b"}, {"prompt": None}, {"prompt": "c"})


def test_ids_are_unique(source):
    with pytest.raises(ConfigurationError, match=re.escape(f"{source.path} repeats 'x'")):
        source({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}, {"prompt": "c", "id": "x"})


def test_an_id_may_not_equal_the_position_of_another(source):
    with pytest.raises(ConfigurationError, match="repeats '2'"):
        source({"prompt": "a", "id": "2"}, {"prompt": "b", "id": None})


def test_missing_file_is_named(source):
    open_it = type(source({"prompt": "a"}))
    nowhere = source.path.parent / "nowhere"
    with pytest.raises(ConfigurationError, match=re.escape(f"there is none at {nowhere}")):
        open_it(nowhere)


def test_many_records_are_read_in_order(source):
    # More than one batch of the columnar readers.
    tasks = source(*({"prompt": f"{i}?", "answer": i} for i in range(2500)))
    assert len(tasks) == 2500
    assert [(t.id, t.messages[0]["content"], t.data["answer"]) for t in tasks] == [
        (str(i + 1), f"{i}?", i) for i in range(2500)
    ]

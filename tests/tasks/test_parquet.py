import re

import pyarrow
import pytest
from pyarrow.parquet import write_table

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import ParquetTasks


def write(path, table, **settings):
    write_table(pyarrow.Table.from_pylist(table) if isinstance(table, list) else table, path, **settings)


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.parquet", [{"prompt": "c"}])
    write(tmp_path / "a.parquet", [{"prompt": "a"}, {"prompt": "b"}])
    (tmp_path / "notes.txt").write_text("no data")
    tasks = ParquetTasks(tmp_path)
    assert [(t.id, t.messages[0]["content"]) for t in tasks] == [("1", "a"), ("2", "b"), ("3", "c")]


def test_files_of_a_folder_may_differ_in_columns_and_types(tmp_path):
    write(tmp_path / "a.parquet", [{"prompt": "a", "level": 1}])
    write(tmp_path / "b.parquet", pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}))
    write(tmp_path / "c.parquet", [{"hint": "h", "level": "hard", "prompt": "b"}])
    assert [t.data for t in ParquetTasks(tmp_path)] == [{"level": 1}, {"hint": "h", "level": "hard"}]


def test_a_column_that_one_file_lacks_names_this_file(tmp_path):
    write(tmp_path / "a.parquet", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    write(tmp_path / "b.parquet", [{"prompt": "c", "answers": "3"}])
    message = f"{tmp_path / 'b.parquet'}, row 1: expected the column 'answer', but the columns are 'answers', 'prompt'"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ParquetTasks(tmp_path, columns={"answer": "answer"})


def test_a_bad_prompt_names_file_and_row(tmp_path):
    write(tmp_path / "a.parquet", [{"prompt": "a"}] * 2)
    write(tmp_path / "b.parquet", [{"prompt": "c"}, {"prompt": None}])
    with pytest.raises(ConfigurationError, match=re.escape(f"{tmp_path / 'b.parquet'}, row 2: ")):
        ParquetTasks(tmp_path)


def test_ids_are_unique_over_all_files(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", [{"prompt": "a", "id": "same"}])
    with pytest.raises(ConfigurationError, match=re.escape(f"{tmp_path} repeats 'same'")):
        ParquetTasks(tmp_path)


def test_row_groups_are_one_file(tmp_path):
    path = tmp_path / "tasks.parquet"
    write(path, [{"prompt": str(i)} for i in range(10)], row_group_size=3)
    assert [t.messages[0]["content"] for t in ParquetTasks(path)] == list(map(str, range(10)))


def test_empty_files_are_refused(tmp_path):
    path = tmp_path / "tasks.parquet"
    write(path, pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}))
    for origin in (path, tmp_path):
        with pytest.raises(ConfigurationError, match=re.escape(f"expected at least one task, but {origin} is empty")):
            ParquetTasks(origin)


def test_a_folder_without_parquet_files_is_refused(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "a"}')
    message = f"expected a Parquet file or a folder of *.parquet files, but there is none at {tmp_path}"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ParquetTasks(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"prompt": "a"}\n' * 5, b"PAR1 and then nothing of it PAR1"])
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tasks.parquet"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=re.escape(f"expected a Parquet file, but cannot read {path}: ")):
        ParquetTasks(path)


def test_damaged_data_are_refused_by_name(tmp_path):
    path = tmp_path / "tasks.parquet"
    write(path, [{"prompt": str(i)} for i in range(1000)])
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=re.escape(f"cannot read {path}: ")):
        ParquetTasks(path)

import re
import sys

import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import DatasetTasks

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `load_dataset` prepares stays out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def prompts(tasks):
    return [task.messages[0]["content"] for task in tasks]


def dataset(*texts, **settings):
    return datasets.Dataset.from_dict({"prompt": list(texts)}, **settings)


@pytest.fixture
def splits(tmp_path):
    datasets.DatasetDict({"train": dataset("a", "b"), "test": dataset("c")}).save_to_disk(tmp_path / "both")
    return tmp_path / "both"


def test_a_split_is_chosen(splits):
    assert prompts(DatasetTasks(splits, split="train")) == ["a", "b"]
    assert prompts(DatasetTasks(splits, split="test")) == ["c"]


@pytest.mark.parametrize("split", [None, "validation"])
def test_the_splits_there_are_get_listed(splits, split):
    message = f"expected split to be one of 'train', 'test' of {splits}, but got {split!r}"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        DatasetTasks(splits, split=split)


def test_the_only_split_needs_no_name(tmp_path):
    datasets.DatasetDict({"train": dataset("a")}).save_to_disk(tmp_path / "one")
    assert prompts(DatasetTasks(tmp_path / "one")) == ["a"]


def test_a_single_dataset_has_the_split_it_was_saved_with(tmp_path):
    dataset("a", split="train").save_to_disk(tmp_path / "one")
    assert prompts(DatasetTasks(tmp_path / "one")) == ["a"]
    assert prompts(DatasetTasks(tmp_path / "one", split="train")) == ["a"]
    with pytest.raises(ConfigurationError, match="expected split to be one of 'train' of .* but got 'test'"):
        DatasetTasks(tmp_path / "one", split="test")


def test_a_dataset_without_splits_has_none_to_choose(tmp_path):
    dataset("a").save_to_disk(tmp_path / "one")
    with pytest.raises(ConfigurationError, match="expected split to be one of None of .* but got 'train'"):
        DatasetTasks(tmp_path / "one", split="train")


def test_selected_rows_keep_their_order(tmp_path):
    dataset("a", "b", "c", "d").select([3, 0, 2]).save_to_disk(tmp_path / "some")
    assert prompts(DatasetTasks(tmp_path / "some")) == ["d", "a", "c"]


def test_a_saved_format_is_undone(tmp_path):
    data = datasets.Dataset.from_dict({"prompt": ["a"], "answer": [4], "other": ["x"]})
    data.with_format("numpy", columns=["prompt", "answer"]).save_to_disk(tmp_path / "numpy")
    (task,) = DatasetTasks(tmp_path / "numpy")
    assert task.data == {"answer": 4, "other": "x"}
    assert type(task.data["answer"]) is int


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tasks.csv", "question,answer\na,1\nb,2\n"),
        ("tasks.jsonl", '{"question": "a", "answer": 1}\n{"question": "b", "answer": 2}\n'),
    ],
)
@pytest.mark.parametrize("given", ["file", "folder", "relative"])
def test_files_that_load_dataset_reads(tmp_path, monkeypatch, name, content, given):
    (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    path = {"file": tmp_path / name, "folder": tmp_path, "relative": name}[given]
    tasks = DatasetTasks(path, columns={"prompt": "question"})
    assert prompts(tasks) == ["a", "b"]
    assert [t.data for t in tasks] == [{"answer": 1}, {"answer": 2}]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "tasks.csv"
    for text in ("first", "second one"):
        path.write_text(f"prompt\n{text}\n")
        assert prompts(DatasetTasks(path)) == [text]


def test_an_empty_dataset_is_refused(tmp_path):
    dataset("a").select([]).save_to_disk(tmp_path / "none")
    (tmp_path / "none.csv").write_text("prompt,answer\n")
    for path in (tmp_path / "none", tmp_path / "none.csv"):
        message = f"expected a dataset with rows, but datasets cannot read {path}: "
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            DatasetTasks(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=re.escape(f"datasets cannot read {tmp_path}: ")):
        DatasetTasks(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tasks.csv", "", "EmptyDataError: No columns"),
        ("tasks.jsonl", '{"prompt": \n', "JSON parse error"),
        ("tasks.unknown", "prompt\na\n", "FileNotFoundError: Unable to find"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_cause(tmp_path, name, content, cause):
    (tmp_path / name).write_text(content)
    message = re.escape(f"datasets cannot read {tmp_path / name}: ")
    with pytest.raises(ConfigurationError, match=f"{message}.*{cause}"):
        DatasetTasks(tmp_path / name)


def test_a_damaged_save_is_refused_by_name(tmp_path):
    path = tmp_path / "saved"
    dataset("a").save_to_disk(path)
    (file,) = path.glob("*.arrow")
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigurationError, match=re.escape(f"datasets cannot read {path}: ")):
        DatasetTasks(path)


def test_missing_path_tells_how_to_get_a_dataset(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none at .*nowhere; download .*load_dataset\(name\)\.save_to_disk"):
        DatasetTasks(tmp_path / "nowhere")


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r"install grpo-lightning\[datasets\]"):
        DatasetTasks(tmp_path)

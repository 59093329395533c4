import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from shown_markdown import shown_table

from grpo_lightning.loggers import Table, TableWriter, TrackioLogger
from grpo_lightning.loggers.tables import markdown_table

TABLE = Table("completions", ("task", "reward"), (("a", 1.0),))


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "|",
        "\\|",
        "\\",
        "**bold** _it_ `code` # title",
        "<b>x</b> & &lt; <script>alert(1)</script>",
        "[link](http://a.b) ![x](y)",
        "<answer>4</answer>",
        "1. one\n2. two\n\n- three",
        "a\r\nb\rc",
        "~~~\n```",
        "http://example.org/?a=1&b=2",
        "$x^2$ $$ \\( \\)",
    ],
)
def test_text_is_shown_as_it_is(text):
    rows = shown_table(markdown_table(Table("t", ("first", "second"), ((text, "end"),))))
    assert rows == [["first", "second"], [text.replace("\r\n", "\n").replace("\r", "\n").strip(), "end"]]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).map(str.strip).filter(bool))
def test_any_text_is_shown_as_it_is(text):
    assert shown_table(markdown_table(Table("t", ("a", "b"), ((text, "end"),))))[1] == [text, "end"]


def test_numbers_and_nothing():
    text = markdown_table(Table("t", ("a", "b", "c"), ((0.12345678, None, 3),)))
    assert text.splitlines()[-1] == "| 0.123457 |  | 3 |"


def test_a_table_is_at_its_step(trackio_directory):
    logger = TrackioLogger("tables", dir=trackio_directory)
    TableWriter().write([logger], TABLE, 7)
    logger.finalize("success")

    from trackio.sqlite_storage import SQLiteStorage

    (row,) = SQLiteStorage.get_logs("tables", run_id=logger.experiment.id)
    assert row["step"] == 7
    assert row["completions"]["_value"] == [{"task": "a", "reward": 1.0}]


def test_mlflow_appends_without_a_bar(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", raising=False)
    logger = MLFlowLogger("tables", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    for step in (0, 1):
        TableWriter().write([logger], TABLE, step)
    assert "Downloading" not in capfd.readouterr().err
    table = logger.experiment.load_table(logger.experiment_id, "completions.json", [logger.run_id])
    assert table.values.tolist() == [["a", 1.0], ["a", 1.0]]


class Stubborn(TensorBoardLogger):
    """A logger whose tool is broken."""

    @property
    def experiment(self):
        raise OSError("disk full")


def test_a_logger_that_fails_is_named_once_and_the_others_get_the_table(tmp_path):
    good = TensorBoardLogger(tmp_path)
    writer = TableWriter()
    with pytest.warns(UserWarning, match="Stubborn did not take the table 'completions'.*OSError: disk full"):
        writer.write([Stubborn(tmp_path), good], TABLE, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.write([Stubborn(tmp_path), good], TABLE, 1)
    good.finalize("success")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(good.log_dir)
    reader.Reload()
    assert [event.step for event in reader.Tensors("completions/text_summary")] == [0, 1]


class Bare(Logger):
    """A logger of a kind that is not known."""

    name = version = "bare"

    def log_metrics(self, *args, **kwargs):
        raise AssertionError

    log_hyperparams = log_metrics


def test_loggers_without_tables_are_left_alone(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TableWriter().write([CSVLogger(tmp_path), Bare()], TABLE, 0)
    assert not list(tmp_path.iterdir())

"""From a run's folder to its page, and what is said where there is nothing to show."""

import json
import re

import pytest
from guessing import guessing_epoch
from transformers import AutoTokenizer

from grpo_lightning.cli import main
from grpo_lightning.cli.trajectories import chosen_epochs
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.trajectories.store import write_epoch


@pytest.fixture
def run(folder, tiny_model):
    """A run's folder with three stored epochs and the settings of a command line."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    path = folder / "runs" / "game" / "version_0"
    path.mkdir(parents=True)
    for number in (0, 1, 4):
        write_epoch(
            path, guessing_epoch(number, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], groups=2)
        )
    (path / "config.yaml").write_text(f"model:\n  model: {tiny_model}\n")
    return path


def data(page, name):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(f'<script type="application/json" id="{name}">(.*?)</script>', text)[1])


def written(path):
    return [row["epoch"] for row in data(path, "about")["epochs"]]


def test_the_page_stands_in_the_run_s_folder(run, capsys):
    assert main(["trajectories", str(run)]) == 0
    page = run / "trajectories.html"
    size = page.stat().st_size / 1e6
    assert capsys.readouterr().out == f"{page}\n3 epochs (0 to 4), {size:.1f} MB\n"
    about = data(page, "about")
    assert (about["title"], about["note"]) == ("game/version_0", "")
    assert written(page) == [0, 1, 4]
    pieces = data(page, "pieces")
    prompt = data(page, "epoch-4")["groups"][0]["prompt"]
    assert None not in pieces["texts"]
    assert "<guess>" in "".join(pieces["texts"][entry] for entry in prompt)


def test_epochs_and_output_can_be_chosen(run, folder, capsys):
    assert main(["trajectories", str(run), "--epochs", "0,2-9", "--output", "out/some.html"]) == 0
    assert written(folder / "out" / "some.html") == [0, 4]
    assert not (run / "trajectories.html").exists()


def test_a_page_is_written_over_whole(run):
    page = run / "trajectories.html"
    page.write_text("old")
    assert main(["trajectories", str(run), "--epochs", "1"]) == 0
    assert written(page) == [1]
    assert [path.name for path in run.glob("*.tmp")] == []


def test_what_is_left_out_of_a_large_run_is_said(run, capsys):
    assert main(["trajectories", str(run), "--max-mb", "0.001"]) == 0
    assert written(run / "trajectories.html") == [4]
    assert "would be larger than 0.001 MB: 2 epochs (0 to 1)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (None, "version_0 names no model. Name one with --tokenizer."),
        ("model: {model: ./gone}", "the tokenizer of ./gone could not be loaded ("),
        ("model: [", "names no model"),
    ],
)
def test_without_a_tokenizer_ids_are_shown(run, settings, note, capsys):
    (run / "config.yaml").unlink()
    if settings:
        (run / "config.yaml").write_text(settings)
    assert main(["trajectories", str(run)]) == 0
    assert set(data(run / "trajectories.html", "pieces")["texts"]) == {None}
    assert note in data(run / "trajectories.html", "about")["note"]
    assert note in capsys.readouterr().out


def test_another_tokenizer_can_be_named(run, tiny_model):
    (run / "config.yaml").unlink()
    assert main(["trajectories", str(run), "--tokenizer", tiny_model]) == 0
    assert None not in data(run / "trajectories.html", "pieces")["texts"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "expected the folder of a run, but there is none at nowhere"),
        (["empty"], "there is no empty/trajectories/epoch-*; give the run's folder"),
        (["empty"], "add grpo_lightning.callbacks.TrajectoryStore"),
        (["RUN", "--epochs", "x"], "expected --epochs such as 3 or 0-4,9, but got 'x'"),
        (["RUN", "--epochs", "7"], "--epochs 7 finds none: 3 epochs (0 to 4)"),
        (["RUN", "--output", "empty"], "expected a file to write the page to, but empty is a folder"),
        (["RUN", "--tokenizer", "./gone"], "expected a tokenizer at --tokenizer ./gone, but got: "),
    ],
)
def test_mistakes(run, folder, args, message, capsys):
    (folder / "empty").mkdir()
    assert main(["trajectories", *(str(run) if arg == "RUN" else arg for arg in args)]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "trajectories.html").exists()


@pytest.mark.parametrize(
    ("wanted", "chosen"), [("3", [3]), ("0-2", [0, 1, 2]), ("5,0-1", [0, 1, 5]), (" 1 - 1 ,1", [1]), ("4-99", [4, 5])]
)
def test_chosen_epochs(wanted, chosen):
    assert chosen_epochs(wanted, range(6)) == chosen


@pytest.mark.parametrize("wanted", ["", "1-", "-1", "1-2-3", "1,,2", "one"])
def test_choices_that_cannot_be_read(wanted):
    with pytest.raises(ConfigurationError, match="expected --epochs such as"):
        chosen_epochs(wanted, range(6))

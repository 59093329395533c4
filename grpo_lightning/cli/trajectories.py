"""``trajectories``: what a run sampled, as a page to look at."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from grpo_lightning.trajectories.pieces import TokenBytes
    from grpo_lightning.trajectories.stored import StoredEpoch

_PAGE = "trajectories.html"


def main(command: str, args: list[str]) -> None:
    """Write a page with the trajectories that a run has stored."""
    parser = argparse.ArgumentParser(
        "grpo-lightning trajectories",
        description="Write what a run sampled as one HTML page that needs nothing else: every episode, turn by turn, "
        "with source, logprob, ratio and advantage of each token. The run must have stored it "
        "(grpo_lightning.callbacks.TrajectoryStore).",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--epochs", help="which of them, for example 3 or 0-4,9; all that were stored by default")
    parser.add_argument("--output", type=Path, help=f"the page to write; {_PAGE} in the run's folder by default")
    parser.add_argument(
        "--max-mb", type=float, default=20.0, help="leave old epochs out of a page that would be larger (20)"
    )
    parser.add_argument(
        "--tokenizer", help="directory or hub name of the tokenizer; that of the run's model by default"
    )
    given = parser.parse_args(args)
    _write(given.run, given.epochs, given.output or given.run / _PAGE, given.max_mb, given.tokenizer)


def _write(run: Path, epochs: str | None, output: Path, max_mb: float, tokenizer: str | None) -> None:
    if output.is_dir():
        raise ConfigurationError(f"expected a file to write the page to, but {output} is a folder")
    paths = _stored(run)
    numbers = chosen_epochs(epochs, paths) if epochs is not None else sorted(paths)

    from tqdm import tqdm

    from grpo_lightning.staging import staged_file
    from grpo_lightning.trajectories.page import render
    from grpo_lightning.trajectories.store import load_epoch

    said, note = _tokenizer(run, tokenizer)
    # None switches tqdm off where the output is not a terminal.
    with tqdm(desc="Epochs", total=len(numbers), leave=False, disable=None) as bar:

        def load(number: int) -> "StoredEpoch":
            bar.update()
            return load_epoch(paths[number])

        title = "/".join(run.resolve().parts[-2:])
        page = render(title, numbers, load, said, max_bytes=int(max_mb * 1e6), note=note)
    output.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(output) as staging:
        staging.write_text(page.html, encoding="utf-8")
    print(output)
    print(f"{_counted(page.epochs)}, {output.stat().st_size / 1e6:.1f} MB")
    if page.left_out:
        print(f"Left out, because the page would be larger than {max_mb:g} MB: {_counted(page.left_out)}.")
    if note:
        print(note)


def _stored(run: Path) -> dict[int, Path]:
    from grpo_lightning.trajectories.store import FOLDER, stored_epochs

    if not run.is_dir():
        raise ConfigurationError(f"expected the folder of a run, but there is none at {run}")
    paths = stored_epochs(run)
    if not paths:
        raise ConfigurationError(
            f"expected stored epochs of a run, but there is no {run / FOLDER / 'epoch-*'}; give the run's folder, the "
            "one with config.yaml, and add grpo_lightning.callbacks.TrajectoryStore to the Trainer's callbacks "
            "before the run, which then stores them"
        )
    return paths


def chosen_epochs(wanted: str, stored: Iterable[int]) -> list[int]:
    """The stored epochs that are asked for.

    Args:
        wanted: Numbers and ranges, for example ``0-4,9``; a range takes what is stored of it.
        stored: Numbers of the stored epochs.

    Raises:
        ConfigurationError: If it cannot be read, or nothing is stored of a part of it.
    """
    there = sorted(stored)
    chosen: set[int] = set()
    for part in wanted.split(","):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isdecimal() for end in ends):
            raise ConfigurationError(f"expected --epochs such as 3 or 0-4,9, but got {wanted!r}")
        found = [number for number in there if int(ends[0]) <= number <= int(ends[-1])]
        if not found:
            raise ConfigurationError(
                f"expected stored epochs, but --epochs {part.strip()} finds none: {_counted(there)}"
            )
        chosen.update(found)
    return sorted(chosen)


def _tokenizer(run: Path, name: str | None) -> "tuple[TokenBytes | None, str]":
    """What tokens say, and why not if that cannot be known."""
    from transformers import AutoTokenizer

    from grpo_lightning.model_source import expanded
    from grpo_lightning.runs import run_model
    from grpo_lightning.trajectories.pieces import token_bytes

    model = name or run_model(run)
    if model is None:
        return None, f"Token ids are shown instead of text: {run} names no model. Name one with --tokenizer."
    try:
        return token_bytes(AutoTokenizer.from_pretrained(expanded(model), trust_remote_code=False)), ""
    except Exception as error:
        # Reading foreign files can fail in any way. Whoever named a tokenizer wants that one, and no page without it.
        first_line = str(error).strip().split("\n")[0]
        if name is not None:
            raise ConfigurationError(f"expected a tokenizer at --tokenizer {name}, but got: {first_line}") from error
        return None, (
            f"Token ids are shown instead of text: the tokenizer of {model} could not be loaded ({first_line}). "
            "Name one with --tokenizer."
        )


def _counted(epochs: Iterable[int]) -> str:
    numbers = list(epochs)
    return f"epoch {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} epochs ({numbers[0]} to {numbers[-1]})"

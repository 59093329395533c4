"""A progress bar for rollouts, of the kind that the Trainer shows."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar
from tqdm import tqdm

from grpo_lightning.rollout.collector import OnEpisode
from grpo_lightning.rollout.episode import Episode
from grpo_lightning.rollout.ledger import Source

_Advance = Callable[[str], None]


@contextlib.contextmanager
def rollout_bar(title: str, total: int, trainer_bar: Any) -> Iterator[OnEpisode]:
    """Show finished episodes, their mean reward and tokens; nothing where the output is not a terminal.

    Args:
        title: What is being sampled.
        total: How many episodes.
        trainer_bar: The Trainer's progress bar. Rich and tqdm garble each other, so the rollout's bar is of the same
            kind, and there is none where the Trainer has none.
    """
    rewards: list[float] = []
    tokens = 0
    with _bar(title, total, trainer_bar) as advance:

        def on_episode(episode: Episode) -> None:
            nonlocal tokens
            tokens += episode.count(Source.SAMPLED)
            if episode.reward is not None:
                rewards.append(episode.reward)
            reward = f"reward {sum(rewards) / len(rewards):.2f}, " if rewards else ""
            advance(f"{reward}{tokens} tokens")

        yield on_episode


@contextlib.contextmanager
def _bar(title: str, total: int, trainer_bar: Any) -> Iterator[_Advance]:
    if isinstance(trainer_bar, RichProgressBar):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda note: progress.update(task, advance=1, note=note)
    else:
        # None switches tqdm off where the output is not a terminal.
        off = True if trainer_bar is None else None
        with tqdm(desc=title, total=total, unit="episode", leave=False, disable=off, dynamic_ncols=True) as bar:

            def advance(note: str) -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update()

            yield advance

"""A progress bar for rollouts."""

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from grpo_lightning.rollout.collector import OnSample
from grpo_lightning.rollout.types import Sample


@contextlib.contextmanager
def rollout_bar(title: str, total: int) -> Iterator[OnSample]:
    """Show finished samples, their mean reward and tokens; nothing where the output is not a terminal."""
    rewards: list[float] = []
    tokens = 0
    with tqdm(desc=title, total=total, unit="sample", leave=False, disable=None, dynamic_ncols=True) as bar:

        def on_sample(sample: Sample) -> None:
            nonlocal tokens
            tokens += len(sample.action.token_ids)
            if sample.reward is not None:
                rewards.append(sample.reward)
            if rewards:
                bar.set_postfix(reward=f"{sum(rewards) / len(rewards):.2f}", tokens=tokens, refresh=False)
            bar.update()

        yield on_sample

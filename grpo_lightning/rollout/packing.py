"""From the ledgers of a rollout to packed micro-batches: pure functions of what was sampled."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_lightning.rollout.batch import PROMPT, PackedBatch
from grpo_lightning.rollout.episode import Episode, Group, ledgers_of
from grpo_lightning.rollout.ledger import Ledger

TokenWeights = Callable[[Sequence[int]], list[float]]
"""From the numbers of sampled tokens of all episodes of an optimizer step to the loss weight of a token in each."""


@dataclass(frozen=True)
class PackedSequence:
    """One sequence on its way into a batch.

    Attributes:
        ledger: Its tokens, at least one of them sampled.
        first_row: Row of its first token among all ledger rows of the rollout.
        advantages: Advantage of every turn of its episode.
        weight: Loss weight of every sampled token.
    """

    ledger: Ledger
    first_row: int
    advantages: tuple[float, ...]
    weight: float

    @property
    def num_inputs(self) -> int:
        """Tokens behind the prompt that predict something: those before the last sampled one."""
        return int(np.flatnonzero(self.ledger.sampled)[-1]) - self.ledger.prompt_length


@dataclass(frozen=True)
class Row:
    """A prompt and the sequences that share it."""

    prompt_ids: tuple[int, ...]
    sequences: tuple[PackedSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Input tokens of the row."""
        return len(self.prompt_ids) + sum(s.num_inputs for s in self.sequences)


@dataclass(frozen=True)
class LocatedGroup:
    """A group and the row of its first token among all ledger rows of the rollout."""

    group: Group
    first_row: int

    def ledgers(self) -> Iterable[tuple[int, Ledger, int]]:
        """Each ledger with the index of its episode and the row of its first token."""
        row = self.first_row
        for index, episode in enumerate(self.group.episodes):
            for ledger in episode.ledgers:
                yield index, ledger, row
                row += len(ledger)


def locate(groups: Sequence[Group]) -> list[LocatedGroup]:
    """Number the ledger rows of a rollout, in the order of groups, episodes, ledgers and tokens."""
    located, row = [], 0
    for group in groups:
        located.append(LocatedGroup(group, row))
        row += sum(map(len, ledgers_of([group])))
    return located


def is_trainable(episode: Episode) -> bool:
    """Whether an episode has a reward to compare, and tokens of the policy that earned it."""
    return episode.reward is not None and any(ledger.sampled.any() for ledger in episode.ledgers)


def usable_rows(groups: Sequence[LocatedGroup], token_weights: TokenWeights) -> list[Row]:
    """One row per prompt, with the episodes that can be trained on and their weights in this optimizer step.

    The episodes of a group share their prompt; where an episode was split, its further sequences have prompts of
    their own. All sequences of an episode together weigh as much as if it were one. A group with fewer than two
    trainable episodes has nothing to compare and gives no row; of the others, masked episodes count in no mean.
    """
    kept = []
    for located in groups:
        trainable = [i for i, episode in enumerate(located.group.episodes) if is_trainable(episode)]
        if len(trainable) >= 2:
            kept.append((located, [i for i in trainable if not located.group.episodes[i].masked]))
    lengths = [
        sum(int(ledger.sampled.sum()) for ledger in located.group.episodes[i].ledgers)
        for located, trainable in kept
        for i in trainable
    ]
    weights = iter(token_weights(lengths))
    rows = []
    for located, trainable in kept:
        weight = dict(zip(trainable, weights, strict=False))
        by_prompt: dict[tuple[int, ...], list[PackedSequence]] = {}
        for index, ledger, first_row in located.ledgers():
            if index in weight and ledger.sampled.any():
                sequence = PackedSequence(ledger, first_row, located.group.advantages[index], weight[index])
                by_prompt.setdefault(ledger.prompt_ids, []).append(sequence)
        rows += [Row(prompt, tuple(sequences)) for prompt, sequences in by_prompt.items()]
    return rows


def split_rows(rows: Sequence[Row], micro_batches: int) -> list[list[Row]]:
    """Distribute rows over exactly ``micro_batches`` micro-batches with about equal numbers of tokens.

    The longest row first goes to the shortest micro-batch. With fewer rows than micro-batches, groups are divided
    (their prompt is then computed more than once); micro-batches that still have nothing get a filler whose
    weight is 0.

    Args:
        rows: At least one row.
        micro_batches: How many micro-batches an optimizer step has.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("expected at least one row to split, but got none")
    pieces = list(rows)
    while len(pieces) < micro_batches:
        largest = max(pieces, key=lambda r: len(r.sequences))
        if len(largest.sequences) < 2:
            break
        pieces.remove(largest)
        half = len(largest.sequences) // 2
        pieces += [replace(largest, sequences=part) for part in (largest.sequences[:half], largest.sequences[half:])]
    bins: list[list[Row]] = [[] for _ in range(micro_batches)]
    sizes = [0] * micro_batches
    for row in sorted(pieces, key=lambda r: -r.num_tokens):
        smallest = sizes.index(min(sizes))
        bins[smallest].append(row)
        sizes[smallest] += row.num_tokens
    filler = min(pieces, key=lambda r: r.num_tokens)
    return [b or [filler_row(filler)] for b in bins]


def filler_row(row: Row) -> Row:
    """A row that costs little and counts for nothing: the shortest sequence, with weight and advantages 0."""
    shortest = min(row.sequences, key=lambda s: s.num_inputs)
    return Row(row.prompt_ids, (replace(shortest, weight=0.0, advantages=(0.0,) * len(shortest.advantages)),))


def pack(rows: Sequence[Row], temperature: float, banned_token_ids: tuple[int, ...] = ()) -> PackedBatch:
    """Lay rows end to end.

    Args:
        rows: Rows of one micro-batch.
        temperature: Sampling temperature.
        banned_token_ids: Tokens that could not be sampled.

    Raises:
        ValueError: If a sequence does not begin with the prompt of its row.
    """
    inputs: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("input_ids", "position_ids", "row_ids", "sequence_ids")
    }
    targets: dict[str, list[NDArray[Any]]] = {}
    total = sequence = 0

    def add(ids: NDArray[Any], position: int, row: int, owner: int) -> None:
        nonlocal total
        count = len(ids)
        columns = (ids, np.arange(position, position + count), np.full(count, row), np.full(count, owner))
        for values, column in zip(inputs.values(), columns, strict=True):
            values.append(column)
        total += count

    for number, row in enumerate(rows):
        prompt = len(row.prompt_ids)
        add(np.array(row.prompt_ids, dtype=np.int64), 0, number, PROMPT)
        last_of_prompt = total - 1
        for item in row.sequences:
            ledger = item.ledger
            if ledger.prompt_ids != row.prompt_ids:
                raise ValueError("expected sequences that begin with the prompt of their row, but got another prompt")
            sampled = np.flatnonzero(ledger.sampled)
            # What precedes a sampled token predicts it: the prompt's last token, or one of this sequence.
            predictor = np.where(sampled == prompt, last_of_prompt, total + sampled - prompt - 1)
            add(ledger.token_ids[prompt : sampled[-1]], prompt, number, sequence)
            turns = ledger.turn[sampled]
            columns = {
                "target_ids": ledger.token_ids[sampled],
                "target_index": predictor,
                "sequence_index": np.full(len(sampled), sequence),
                "old_logprobs": ledger.logprobs[sampled].astype(np.float32),
                "advantages": np.array(item.advantages, dtype=np.float32)[turns],
                "loss_weight": np.full(len(sampled), item.weight, dtype=np.float32),
                "marked": np.zeros(len(sampled), dtype=np.bool_),
                "proximal_logprobs": np.full(len(sampled), np.nan, dtype=np.float32),
                "focus": np.ones(len(sampled), dtype=np.bool_),
                "policy_version": ledger.policy_version[sampled],
                "turn": turns,
                "source": ledger.source[sampled],
                "ledger_index": item.first_row + sampled,
            }
            for name, column in columns.items():
                targets.setdefault(name, []).append(column)
            sequence += 1
    tensors: dict[str, Any] = {
        name: torch.from_numpy(np.concatenate(parts)) for name, parts in (inputs | targets).items()
    }
    return PackedBatch(**tensors, temperature=temperature, banned_token_ids=banned_token_ids)

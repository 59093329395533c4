"""From trajectories to packed micro-batches: pure functions of what was sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from grpo_lightning.rollout.batch import PROMPT, PackedBatch
from grpo_lightning.rollout.types import Group

TokenWeights = Callable[[Sequence[int]], list[float]]
"""From the lengths of all completions of an optimizer step to the loss weight of a token in each."""


@dataclass(frozen=True)
class PackedSequence:
    """One completion on its way into a batch.

    Attributes:
        token_ids: Sampled tokens, at least one.
        logprobs: Their sample-time log-probabilities.
        advantage: Advantage of every token.
        weight: Loss weight of every token.
        policy_version: Version that sampled them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float
    weight: float
    policy_version: int


@dataclass(frozen=True)
class Row:
    """A prompt and completions that share it."""

    prompt_ids: tuple[int, ...]
    sequences: tuple[PackedSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Input tokens of the row."""
        return len(self.prompt_ids) + sum(len(s.token_ids) - 1 for s in self.sequences)


def usable_rows(groups: Sequence[Group], token_weights: TokenWeights) -> list[Row]:
    """One row per group, with the samples that can be trained on and their weights in this optimizer step.

    A group with fewer than two scored samples has nothing to compare and gives no row.
    """
    kept = [(g, [i for i, s in enumerate(g.samples) if s.reward is not None]) for g in groups]
    kept = [(g, indices) for g, indices in kept if len(indices) >= 2]
    lengths = [len(g.samples[i].action.token_ids) for g, indices in kept for i in indices]
    weights = iter(token_weights(lengths))
    rows = []
    for group, indices in kept:
        sequences = []
        for i in indices:
            action = group.samples[i].action
            sequences.append(
                PackedSequence(
                    action.token_ids,
                    action.token_logprobs,
                    group.advantages[i],
                    next(weights),
                    action.policy_version,
                )
            )
        rows.append(Row(group.prompt_ids, tuple(sequences)))
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
    """A row that costs little and counts for nothing: the shortest completion, with weight and advantage 0."""
    shortest = min(row.sequences, key=lambda s: len(s.token_ids))
    return Row(row.prompt_ids, (replace(shortest, weight=0.0, advantage=0.0),))


def pack(rows: Sequence[Row], temperature: float, banned_token_ids: tuple[int, ...] = ()) -> PackedBatch:
    """Lay rows end to end.

    Args:
        rows: Rows of one micro-batch, each with a prompt and completions of at least one token.
        temperature: Sampling temperature.
        banned_token_ids: Tokens that could not be sampled.

    Raises:
        ValueError: If a prompt or a completion is empty, or logprobs do not match tokens.
    """
    inputs: list[int] = []
    positions: list[int] = []
    row_ids: list[int] = []
    sequence_ids: list[int] = []
    targets: list[int] = []
    target_index: list[int] = []
    sequence_index: list[int] = []
    per_target: list[tuple[float, float, float, int]] = []
    sequence = 0
    for number, row in enumerate(rows):
        if not row.prompt_ids:
            raise ValueError("expected a prompt of at least one token, but got an empty one")
        last_of_prompt = len(inputs) + len(row.prompt_ids) - 1
        inputs += row.prompt_ids
        positions += range(len(row.prompt_ids))
        sequence_ids += [PROMPT] * len(row.prompt_ids)
        for item in row.sequences:
            length = len(item.token_ids)
            if length == 0 or len(item.logprobs) != length:
                raise ValueError(f"expected one logprob per sampled token, but got {len(item.logprobs)} for {length}")
            targets += item.token_ids
            target_index += [last_of_prompt, *range(len(inputs), len(inputs) + length - 1)]
            inputs += item.token_ids[:-1]
            positions += range(len(row.prompt_ids), len(row.prompt_ids) + length - 1)
            sequence_ids += [sequence] * (length - 1)
            sequence_index += [sequence] * length
            per_target += [(lp, item.advantage, item.weight, item.policy_version) for lp in item.logprobs]
            sequence += 1
        row_ids += [number] * (len(inputs) - len(row_ids))
    old, advantages, weights, versions = zip(*per_target, strict=True) if per_target else ((), (), (), ())
    return PackedBatch(
        input_ids=torch.tensor(inputs),
        position_ids=torch.tensor(positions),
        row_ids=torch.tensor(row_ids),
        sequence_ids=torch.tensor(sequence_ids),
        target_ids=torch.tensor(targets, dtype=torch.int64),
        target_index=torch.tensor(target_index, dtype=torch.int64),
        sequence_index=torch.tensor(sequence_index, dtype=torch.int64),
        old_logprobs=torch.tensor(old, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        loss_weight=torch.tensor(weights, dtype=torch.float32),
        policy_version=torch.tensor(versions, dtype=torch.int64),
        temperature=temperature,
        banned_token_ids=banned_token_ids,
    )

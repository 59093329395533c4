from dataclasses import replace

import pytest
import torch
from fakes import make_episode, make_group
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import packable_rows

from grpo_lightning.functional.aggregation import token_weights
from grpo_lightning.policy import unpack
from grpo_lightning.rollout.batch import PROMPT
from grpo_lightning.rollout.episode import Episode, Turn
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.packing import (
    PackedSequence,
    Row,
    filler_row,
    is_trainable,
    locate,
    pack,
    split_rows,
    usable_rows,
)
from grpo_lightning.rollout.types import Action

MICRO_BATCHES = range(1, 9)


def by_sequence(lengths):
    return token_weights(lengths, "sequence")


def by_token(lengths):
    return token_weights(lengths, "token")


def single(prompt, tokens, logprobs, advantage, weight, version, first_row=0):
    """A sequence of one turn on its way into a batch."""
    ledger = Ledger.of_prompt(prompt).extended(tokens, Source.SAMPLED, 0, logprobs, version)
    return PackedSequence(ledger, first_row, (advantage,), weight)


def row(prompt_length, *lengths):
    prompt = tuple(range(prompt_length))
    return Row(prompt, tuple(single(prompt, (1,) * n, (-0.5,) * n, 1.0, 0.25, 3) for n in lengths))


def sampled(sequence):
    """Its sampled tokens and their logprobs."""
    ledger = sequence.ledger
    return tuple(ledger.token_ids[ledger.sampled].tolist()), tuple(ledger.logprobs[ledger.sampled].tolist())


def rows_of(groups, aggregation=by_sequence):
    return usable_rows(locate(groups), aggregation)


def pairs(rows):
    return sorted(
        (r.prompt_ids, tuple(s.ledger.token_ids.tolist()), *sampled(s), s.first_row, s.advantages, s.weight)
        for r in rows
        for s in r.sequences
    )


def test_rows_carry_what_was_sampled():
    samples = [
        make_episode([5, 6, 7], 1.0, prompt=[1, 2], version=4),
        make_episode([8], 0.0, prompt=[1, 2], version=4),
    ]
    [only] = rows_of([make_group(samples, [1.0, -1.0])])
    assert only.prompt_ids == (1, 2)
    first, second = only.sequences
    assert sampled(first) == ((5, 6, 7), samples[0].turns[0].action.token_logprobs)
    assert sampled(second) == ((8,), samples[1].turns[0].action.token_logprobs)
    assert (first.advantages, second.advantages) == ((1.0,), (-1.0,))
    assert (first.weight, second.weight) == (pytest.approx(1 / 6), pytest.approx(1 / 2))
    assert (first.first_row, second.first_row) == (0, 5)
    assert {v for s in only.sequences for v in s.ledger.policy_version[s.ledger.sampled].tolist()} == {4}
    assert only.num_tokens == 2 + 2 + 0


def test_samples_without_reward_and_lonely_ones_are_left_out():
    def group(prompt, *episodes):
        made = [make_episode(tokens, reward, prompt=[prompt]) for tokens, reward, _ in episodes]
        return make_group(made, [advantage for _, _, advantage in episodes])

    groups = [
        group(1, ([1, 1], None, 0.0), ([2], 0.5, -1.0), ([3], 1.0, 1.0)),
        group(2, ([4], 1.0, 0.0), ([5], None, 0.0)),
        group(3, ([6], None, 0.0), ([7], None, 0.0)),
        group(4, ([8, 8, 8], 1.0, 1.0), ([9], 0.0, -1.0)),
    ]
    rows = rows_of(groups, by_token)
    assert [r.prompt_ids for r in rows] == [(1,), (4,)]
    assert [[sampled(s)[0] for s in r.sequences] for r in rows] == [[(2,), (3,)], [(8, 8, 8), (9,)]]
    assert [s.advantages for r in rows for s in r.sequences] == [(-1.0,), (1.0,), (1.0,), (-1.0,)]
    # Ledger rows of what is left out are counted: 3 + 2 + 2, then two groups of 2 + 2.
    assert [s.first_row for r in rows for s in r.sequences] == [3, 5, 15, 19]
    # The weights are those of the samples that take part: 6 tokens.
    assert [s.weight for r in rows for s in r.sequences] == [pytest.approx(1 / 6)] * 4


def test_episodes_that_the_policy_had_no_part_in_are_left_out():
    forced = Action("", (7, 8), (), 0.0, True, "stop", -1)
    scripted = Episode((Turn((), forced),), (Ledger.of_prompt([1]).extended([7, 8], Source.FORCED, 0),), {}, 1.0)
    broken = Episode((), (), {}, None, "error")
    played = make_episode([5], 0.0, prompt=[1])
    assert [is_trainable(e) for e in (scripted, broken, played)] == [False, False, True]
    assert rows_of([make_group([scripted, broken, played], [1.0, 0.0, -1.0])]) == []
    [only] = rows_of([make_group([scripted, played, broken, played], [1.0, -1.0, 0.0, -1.0])])
    assert [(sampled(s)[0], s.weight, s.first_row) for s in only.sequences] == [((5,), 0.5, 3), ((5,), 0.5, 5)]


def split_and_unsplit():
    """One episode of three turns as two sequences, the same as one, and another of one turn."""
    said = [
        Action("", (5, 6), (-0.5, -0.25), -0.75, False, "stop", 3),
        Action("", (7,), (-1.0,), -1.0, False, "stop", 3),
    ]
    said.append(Action("", (8, 9, 10), (-1.5, -2.0, -2.5), -6.0, False, "stop", 4))

    def play(cut_at):
        ledger, done = Ledger.of_prompt([1, 2]), []
        for number, action in enumerate(said):
            if number == cut_at:
                done.append(ledger)
                ledger = Ledger.of_prompt([1, 2, 3], number)
            elif number:
                ledger = ledger.extended([50 + number], Source.ENVIRONMENT, number)
            ledger = ledger.extended(action.token_ids, Source.SAMPLED, number, action.token_logprobs, 3 + number // 2)
        return Episode(tuple(Turn((), action) for action in said), (*done, ledger), {}, 1.0)

    return play(2), play(None), make_episode([4], 0.0, prompt=[1, 2])


@pytest.mark.parametrize("aggregation", [by_sequence, by_token])
def test_an_episode_in_several_sequences_weighs_as_much_as_in_one(aggregation):
    split, unsplit, other = split_and_unsplit()
    advantages = [(0.5, 1.0, 1.5), (-1.0,)]
    found = []
    for episode in (split, unsplit):
        group = replace(make_group([episode, other]), advantages=tuple(advantages))
        batch = pack(rows_of([group], aggregation), 1.0)
        mine = batch.advantages > 0
        columns = (batch.target_ids, batch.loss_weight, batch.advantages, batch.turn, batch.policy_version)
        found.append(sorted(zip(*(column[mine].tolist() for column in columns), strict=True)))
        assert float(batch.loss_weight.sum()) == pytest.approx(1.0)
        expected = 1 / 2 if aggregation is by_sequence else 6 / 7
        assert float(batch.loss_weight[mine].sum()) == pytest.approx(expected)
    assert found[0] == found[1]
    assert [(token, advantage, turn) for token, _, advantage, turn, _ in found[0]] == [
        (5, 0.5, 0),
        (6, 0.5, 0),
        (7, 1.0, 1),
        (8, 1.5, 2),
        (9, 1.5, 2),
        (10, 1.5, 2),
    ]


def test_sequences_share_a_row_by_their_prompt():
    split, unsplit, other = split_and_unsplit()
    rows = rows_of([make_group([split, other, unsplit, split], [1.0] * 4)])
    assert [(r.prompt_ids, len(r.sequences)) for r in rows] == [((1, 2), 4), ((1, 2, 3), 2)]
    assert [[s.first_row for s in r.sequences] for r in rows] == [[0, 12, 15, 25], [6, 31]]


@pytest.mark.parametrize("aggregation", [by_sequence, by_token])
def test_no_usable_group_gives_no_row(aggregation):
    assert rows_of([make_group([make_episode([1], 1.0)], [0.0])], aggregation) == []
    assert rows_of([], aggregation) == []


@settings(max_examples=100, deadline=None)
@given(rows=packable_rows, count=st.sampled_from(MICRO_BATCHES))
def test_number_of_micro_batches_is_exact_and_nothing_is_lost(rows, count):
    parts = split_rows(rows, count)
    assert len(parts) == count
    assert all(parts)
    total = sum(len(r.sequences) for r in rows)
    fillers = max(0, count - total)
    cut = [r for part in parts for r in part]
    assert all(r.sequences for r in cut)
    if fillers == 0:
        assert pairs(cut) == pairs(rows)
    else:
        lonely = [p[0] for p in parts if len(p) == 1 and len(p[0].sequences) == 1]
        idle = [r for r in lonely if r.sequences[0].weight == 0 and not any(r.sequences[0].advantages)]
        assert len(idle) >= fillers
        assert len(pairs(cut)) == total + fillers


@pytest.mark.parametrize("count", MICRO_BATCHES)
def test_four_groups_of_two(count):
    rows = [row(4, 3, 5) for _ in range(4)]
    parts = split_rows(rows, count)
    assert len(parts) == count
    assert sum(len(r.sequences) for p in parts for r in p) == 8
    # Groups are cut only when there are fewer of them than micro-batches, and no more than needed.
    assert sum(len(p) for p in parts) == max(4, count)


def test_micro_batches_have_about_equal_tokens():
    rows = [row(5, *[n] * 4) for n in (40, 3, 11, 25, 7, 30, 18, 2, 9, 33, 21, 14)]
    for count in (2, 3, 4):
        sizes = [sum(r.num_tokens for r in part) for part in split_rows(rows, count)]
        assert sum(sizes) == sum(r.num_tokens for r in rows)
        assert max(sizes) < 1.2 * sum(sizes) / count


@settings(max_examples=60, deadline=None)
@given(rows=packable_rows, count=st.sampled_from(MICRO_BATCHES))
def test_imbalance_is_at_most_one_row(rows, count):
    if len(rows) < count:
        return
    sizes = [sum(r.num_tokens for r in part) for part in split_rows(rows, count)]
    assert max(sizes) - min(sizes) <= max(r.num_tokens for r in rows)


def test_longest_group_is_divided_when_there_are_too_few():
    small, large = row(3, 2, 2), row(3, 4, 5, 6, 7, 8)
    parts = split_rows([small, large], 3)
    assert sorted(len(p) for p in parts) == [1, 1, 1]
    sizes = sorted(len(p[0].sequences) for p in parts)
    assert sizes == [2, 2, 3]
    assert pairs([r for p in parts for r in p]) == pairs([small, large])
    assert {r.prompt_ids for p in parts for r in p} == {(0, 1, 2)}


def test_fillers_weigh_nothing_and_are_cheap():
    parts = split_rows([row(3, 9, 1, 4)], 8)
    assert len(parts) == 8
    fillers = [p[0] for p in parts if p[0].sequences[0].weight == 0]
    assert len(fillers) == 5
    for filler in fillers:
        [sequence] = filler.sequences
        assert sequence.advantages == (0.0,)
        assert sampled(sequence)[0] == (1,)
        batch = pack([filler], 1.0)
        assert float(batch.loss_weight.sum()) == 0
        assert float(batch.advantages.abs().sum()) == 0


def test_filler_is_the_shortest_completion():
    original = row(3, 9, 2, 4)
    filler = filler_row(original)
    assert filler.prompt_ids == original.prompt_ids
    assert [sampled(s)[0] for s in filler.sequences] == [(1, 1)]
    assert original.sequences[1].weight == 0.25


def test_splitting_repeats():
    rows = [row(2, n, n + 1) for n in (3, 8, 3, 5, 9, 1)]
    assert split_rows(rows, 4) == split_rows(rows, 4)


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_to_split_is_refused(count):
    with pytest.raises(ValueError, match="at least one row"):
        split_rows([], count)


TARGET_COLUMNS = (
    "target_ids",
    "target_index",
    "sequence_index",
    "old_logprobs",
    "advantages",
    "loss_weight",
    "policy_version",
    "turn",
    "source",
    "ledger_index",
)


def layout_by_loops(rows):
    """The same layout, one token after the other."""
    inputs, targets = [], []
    sequence = -1
    for number, r in enumerate(rows):
        for position, token in enumerate(r.prompt_ids):
            inputs.append((token, position, number, PROMPT))
        prompt_end = len(inputs) - 1
        for s in r.sequences:
            sequence += 1
            own = list(zip(*(c.tolist() for c in vars(s.ledger).values()), strict=True))
            last = max(i for i, (_, source, *_) in enumerate(own) if source == Source.SAMPLED)
            predictor = prompt_end
            for position, (token, source, logprob, version, turn) in enumerate(own):
                if source == Source.PROMPT:
                    continue
                if source == Source.SAMPLED:
                    columns = (logprob, s.advantages[turn], s.weight, version, turn, source, s.first_row + position)
                    targets.append((token, predictor, sequence, *columns))
                if position < last:
                    predictor = len(inputs)
                    inputs.append((token, position, number, sequence))
    return inputs, targets


@settings(max_examples=100, deadline=None)
@given(rows=packable_rows)
def test_layout_equals_the_loops(rows):
    batch = pack(rows, 0.7)
    inputs, targets = layout_by_loops(rows)
    columns = ("input_ids", "position_ids", "row_ids", "sequence_ids")
    for name, column in zip(columns, zip(*inputs, strict=True), strict=True):
        assert getattr(batch, name).tolist() == list(column), name
    for name, column in zip(TARGET_COLUMNS, zip(*targets, strict=True), strict=True):
        assert getattr(batch, name).tolist() == list(column), name
    assert batch.num_tokens == len(inputs) == sum(r.num_tokens for r in rows)
    assert batch.num_targets == len(targets)
    assert batch.temperature == 0.7
    batch.require_sampled()


def test_layout_of_a_small_batch_by_hand():
    first = single([10, 11], (20, 21, 22), (-1.0, -2.0, -3.0), 0.5, 0.1, 7, first_row=100)
    second = single([10, 11], (30,), (-4.0,), -0.5, 0.2, 7, first_row=105)
    third = single([12], (40, 41), (-5.0, -6.0), 1.5, 0.3, 8, first_row=50)
    rows = [Row((10, 11), (first, second)), Row((12,), (third,))]
    batch = pack(rows, 1.0)
    assert batch.input_ids.tolist() == [10, 11, 20, 21, 12, 40]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.row_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.sequence_ids.tolist() == [-1, -1, 0, 0, -1, 2]
    assert batch.target_ids.tolist() == [20, 21, 22, 30, 40, 41]
    assert batch.target_index.tolist() == [1, 2, 3, 1, 4, 5]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.old_logprobs.tolist() == [-1, -2, -3, -4, -5, -6]
    assert batch.policy_version.tolist() == [7, 7, 7, 7, 8, 8]
    assert batch.turn.tolist() == [0] * 6
    assert batch.ledger_index.tolist() == [102, 103, 104, 107, 51, 52]
    assert batch.index == -1
    assert not batch.first_of_rollout


def test_layout_of_several_turns_by_hand():
    begun = Ledger.of_prompt([10, 11])
    # A turn, its forced end, an observation, a turn, an observation that nobody answered.
    played = begun.extended([20, 21], Source.SAMPLED, 0, [-1.0, -2.0], 3).extended([22], Source.FORCED, 0)
    played = played.extended([30, 31], Source.ENVIRONMENT, 1).extended([40], Source.SAMPLED, 1, [-3.0], 4)
    played = played.extended([32, 33], Source.ENVIRONMENT, 2)
    # The system opens, and it also has the last word.
    scripted = begun.extended([50], Source.FORCED, 0).extended([51], Source.ENVIRONMENT, 1)
    scripted = scripted.extended([60, 61], Source.SAMPLED, 1, [-4.0, -5.0], 4).extended([62], Source.FORCED, 2)
    rows = [
        Row(
            (10, 11),
            (PackedSequence(played, 0, (0.5, 1.5, 9.0), 0.1), PackedSequence(scripted, 10, (9.0, -1.0, 9.0), 0.2)),
        )
    ]
    batch = pack(rows, 1.0)
    assert batch.input_ids.tolist() == [10, 11, 20, 21, 22, 30, 31, 50, 51, 60]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4]
    assert batch.sequence_ids.tolist() == [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.target_ids.tolist() == [20, 21, 40, 60, 61]
    assert batch.target_index.tolist() == [1, 2, 6, 8, 9]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.old_logprobs.tolist() == [-1, -2, -3, -4, -5]
    assert batch.advantages.tolist() == [0.5, 0.5, 1.5, -1.0, -1.0]
    assert batch.policy_version.tolist() == [3, 3, 4, 4, 4]
    assert batch.turn.tolist() == [0, 0, 1, 1, 1]
    assert batch.ledger_index.tolist() == [2, 3, 7, 14, 15]
    assert batch.source.tolist() == [Source.SAMPLED] * 5


def test_dtypes():
    batch = pack([row(2, 3, 1)], 1.0)
    for name in ("input_ids", "position_ids", "row_ids", "sequence_ids", "target_ids", "target_index"):
        assert getattr(batch, name).dtype == torch.int64
    for name in ("sequence_index", "policy_version", "turn", "ledger_index"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.source.dtype == torch.int8
    assert batch.old_logprobs.dtype == batch.advantages.dtype == batch.loss_weight.dtype == torch.float32


@settings(max_examples=100, deadline=None)
@given(rows=packable_rows, count=st.sampled_from(MICRO_BATCHES))
def test_every_sequence_is_recovered_exactly(rows, count):
    found = []
    for part in split_rows(rows, count):
        ids, lengths, sequence, position = unpack(pack(part, 1.0))
        expected = [s for r in part for s in r.sequences]
        assert len(ids) == len(expected)
        for line, s in enumerate(expected):
            places = s.ledger.sampled.nonzero()[0]
            length = int(lengths[line])
            # All that its last sampled token follows, and no more.
            assert length == places[-1]
            assert ids[line, :length].tolist() == s.ledger.token_ids[:length].tolist()
            assert not ids[line, length:].any()
            assert position[sequence == line].tolist() == (places - 1).tolist()
            if s.weight or any(s.advantages):
                found.append((s.ledger.prompt_ids, *sampled(s)))
    kept = sorted((r.prompt_ids, *sampled(s)) for r in rows for s in r.sequences if s.weight or any(s.advantages))
    assert sorted(found) == kept


def test_a_sequence_with_another_prompt_than_its_row_is_refused():
    good = row(2, 3)
    with pytest.raises(ValueError, match="expected sequences that begin with the prompt of their row, but got another"):
        pack([good, replace(good, prompt_ids=(0, 2))], 1.0)


class TestMasked:
    def test_weights_count_those_that_are_not_masked(self):
        first = [make_episode([5] * n, float(n)) for n in (1, 2, 3)]
        second = [make_episode([6] * n, float(n)) for n in (4, 5)]
        groups = [
            make_group([first[0], replace(first[1], masked=True), first[2]], [-1.0, 0.0, 1.0]),
            make_group(second, [-1.0, 1.0]),
        ]
        given = []

        def weights(lengths):
            given.append(list(lengths))
            return by_sequence(lengths)

        rows = rows_of(groups, weights)
        assert given == [[1, 3, 4, 5]]
        found = {len(s.ledger) - 2: (s.weight, s.advantages) for row in rows for s in row.sequences}
        assert {n: w for n, (w, _) in found.items()} == pytest.approx({n: 1 / (4 * n) for n in (1, 3, 4, 5)})
        assert found[3][1] == (1.0,)
        assert {n: a for n, (_, a) in found.items()} == {1: (-1.0,), 3: (1.0,), 4: (-1.0,), 5: (1.0,)}

    def test_a_group_of_one_unmasked_episode_still_trains(self):
        episodes = [make_episode([5] * n, float(n)) for n in (1, 2, 3)]
        group = make_group([replace(e, masked=i != 1) for i, e in enumerate(episodes)], [-1.0, 0.5, 1.0])
        [row] = rows_of([group])
        [only] = row.sequences
        assert (only.weight, only.advantages, only.first_row) == (pytest.approx(1 / 2), (0.5,), 3)

    def test_a_masked_episode_is_something_to_compare_with(self):
        """But an episode without a reward is not."""
        alone, failed = make_episode([5], 1.0), make_episode([7], None)
        masked = replace(make_episode([6], 0.0), masked=True)
        assert len(rows_of([make_group([alone, masked], [1.0, -1.0])])) == 1
        assert rows_of([make_group([alone, failed], [0.0, 0.0])]) == []

    def test_a_group_that_is_masked_altogether_takes_no_weight(self):
        some = make_group([make_episode([5], 1.0), make_episode([6], 0.0)], [1.0, -1.0])
        none = make_group([replace(make_episode([5], r), masked=True) for r in (0.0, 1.0)], [-1.0, 1.0])
        assert pairs(rows_of([some, none])) == pairs(rows_of([some]))

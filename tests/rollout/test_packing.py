import pickle
from dataclasses import replace

import pytest
import torch
from fakes import make_group, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.aggregation import token_weights
from grpo_lightning.policy import unpack
from grpo_lightning.rollout.batch import PROMPT
from grpo_lightning.rollout.packing import PackedSequence, Row, filler_row, pack, split_rows, usable_rows

MICRO_BATCHES = range(1, 9)


def test_banned_tokens_stay_with_the_batch():
    batch = pack([row(3, 2), row(2, 1)], 0.7, (4, 9))
    assert batch.banned_token_ids == batch.first_rows(1).banned_token_ids == batch.to("cpu").banned_token_ids == (4, 9)
    assert pack([row(3, 2)], 0.7).banned_token_ids == ()


def by_sequence(lengths):
    return token_weights(lengths, "sequence")


def by_token(lengths):
    return token_weights(lengths, "token")


@st.composite
def sequences(draw):
    tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
    logprobs = draw(st.lists(st.floats(-20, 0, width=32), min_size=len(tokens), max_size=len(tokens)))
    return PackedSequence(
        tuple(tokens),
        tuple(logprobs),
        draw(st.floats(-3, 3, width=32)),
        draw(st.floats(0, 1, width=32)),
        draw(st.integers(0, 1000)),
    )


rows_ = st.lists(
    st.builds(
        Row,
        st.lists(st.integers(0, 99), min_size=1, max_size=15).map(tuple),
        st.lists(sequences(), min_size=1, max_size=6).map(tuple),
    ),
    min_size=1,
    max_size=7,
)
groups_ = st.lists(
    st.builds(
        lambda prompt, samples: make_group(
            prompt, [make_sample(t, r) for t, r in samples], [0.5 * i for i in range(len(samples))]
        ),
        st.lists(st.integers(0, 99), min_size=1, max_size=15),
        st.lists(
            st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=12), st.sampled_from([None, 0.0, 1.0])),
            min_size=1,
            max_size=6,
        ),
    ),
    min_size=1,
    max_size=6,
)


def row(prompt_length, *lengths):
    return Row(
        tuple(range(prompt_length)),
        tuple(PackedSequence((1,) * n, (-0.5,) * n, 1.0, 0.25, 3) for n in lengths),
    )


def pairs(rows):
    return sorted((r.prompt_ids, s.token_ids, s.logprobs, s.advantage, s.weight) for r in rows for s in r.sequences)


def test_rows_carry_what_was_sampled():
    samples = [make_sample([5, 6, 7], 1.0, version=4), make_sample([8], 0.0, version=4)]
    [only] = usable_rows([make_group([1, 2], samples, [1.0, -1.0])], by_sequence)
    assert only.prompt_ids == (1, 2)
    first, second = only.sequences
    assert (first.token_ids, first.logprobs) == ((5, 6, 7), samples[0].action.token_logprobs)
    assert (second.token_ids, second.logprobs) == ((8,), samples[1].action.token_logprobs)
    assert (first.advantage, second.advantage) == (1.0, -1.0)
    assert (first.weight, second.weight) == (pytest.approx(1 / 6), pytest.approx(1 / 2))
    assert {s.policy_version for s in only.sequences} == {4}
    assert only.num_tokens == 2 + 2 + 0


def test_samples_without_reward_and_lonely_ones_are_left_out():
    groups = [
        make_group([1], [make_sample([1, 1], None), make_sample([2], 0.5), make_sample([3], 1.0)], [0.0, -1.0, 1.0]),
        make_group([2], [make_sample([4], 1.0), make_sample([5], None)], [0.0, 0.0]),
        make_group([3], [make_sample([6], None), make_sample([7], None)], [0.0, 0.0]),
        make_group([4], [make_sample([8, 8, 8], 1.0), make_sample([9], 0.0)], [1.0, -1.0]),
    ]
    rows = usable_rows(groups, by_token)
    assert [r.prompt_ids for r in rows] == [(1,), (4,)]
    assert [[s.token_ids for s in r.sequences] for r in rows] == [[(2,), (3,)], [(8, 8, 8), (9,)]]
    assert [s.advantage for r in rows for s in r.sequences] == [-1.0, 1.0, 1.0, -1.0]
    # The weights are those of the samples that take part: 6 tokens.
    assert [s.weight for r in rows for s in r.sequences] == [pytest.approx(1 / 6)] * 4


@pytest.mark.parametrize("aggregation", [by_sequence, by_token])
def test_no_usable_group_gives_no_row(aggregation):
    assert usable_rows([make_group([1], [make_sample([1], 1.0)], [0.0])], aggregation) == []
    assert usable_rows([], aggregation) == []


@settings(max_examples=60)
@given(groups=groups_, aggregation=st.sampled_from([by_sequence, by_token]), count=st.integers(1, 8))
def test_weights_of_a_step_sum_to_one_however_it_is_cut(groups, aggregation, count):
    rows = usable_rows(groups, aggregation)
    if not rows:
        return
    batches = [pack(part, 1.0) for part in split_rows(rows, count)]
    assert len(batches) == count
    total = sum(float(b.loss_weight.double().sum()) for b in batches)
    assert total == pytest.approx(1.0, abs=1e-5)
    trained = sum(int((b.loss_weight > 0).sum()) for b in batches)
    assert trained == sum(len(s.token_ids) for r in rows for s in r.sequences)


@settings(max_examples=100)
@given(rows=rows_, count=st.sampled_from(MICRO_BATCHES))
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
        idle = [r for r in lonely if r.sequences[0].weight == 0 and r.sequences[0].advantage == 0]
        assert len(idle) >= fillers
        assert len(pairs(cut)) == total + fillers


@pytest.mark.parametrize("count", MICRO_BATCHES)
def test_four_groups_of_two(count):
    rows = [replace(row(4, 3, 5), prompt_ids=(i,) * 4) for i in range(4)]
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


@settings(max_examples=60)
@given(rows=rows_, count=st.sampled_from(MICRO_BATCHES))
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
        assert sequence.advantage == 0
        assert sequence.token_ids == (1,)
        batch = pack([filler], 1.0)
        assert float(batch.loss_weight.sum()) == 0
        assert float(batch.advantages.abs().sum()) == 0


def test_filler_is_the_shortest_completion():
    original = row(3, 9, 2, 4)
    filler = filler_row(original)
    assert filler.prompt_ids == original.prompt_ids
    assert [s.token_ids for s in filler.sequences] == [(1, 1)]
    assert original.sequences[1].weight == 0.25


def test_splitting_repeats():
    rows = [row(2, n, n + 1) for n in (3, 8, 3, 5, 9, 1)]
    assert split_rows(rows, 4) == split_rows(rows, 4)


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_to_split_is_refused(count):
    with pytest.raises(ValueError, match="at least one row"):
        split_rows([], count)


def layout_by_loops(rows):
    """The same layout, one token after the other."""
    inputs, positions, row_ids, sequence_ids = [], [], [], []
    targets = []
    sequence = -1
    for number, r in enumerate(rows):
        prompt_end = None
        for position, token in enumerate(r.prompt_ids):
            prompt_end = len(inputs)
            inputs.append(token)
            positions.append(position)
            row_ids.append(number)
            sequence_ids.append(PROMPT)
        for s in r.sequences:
            sequence += 1
            predictor = prompt_end
            for offset, (token, logprob) in enumerate(zip(s.token_ids, s.logprobs, strict=True)):
                targets.append((token, predictor, sequence, logprob, s.advantage, s.weight, s.policy_version))
                if offset < len(s.token_ids) - 1:
                    predictor = len(inputs)
                    inputs.append(token)
                    positions.append(len(r.prompt_ids) + offset)
                    row_ids.append(number)
                    sequence_ids.append(sequence)
    return inputs, positions, row_ids, sequence_ids, targets


@settings(max_examples=100)
@given(rows=rows_)
def test_layout_equals_the_loops(rows):
    batch = pack(rows, 0.7)
    inputs, positions, row_ids, sequence_ids, targets = layout_by_loops(rows)
    assert batch.input_ids.tolist() == inputs
    assert batch.position_ids.tolist() == positions
    assert batch.row_ids.tolist() == row_ids
    assert batch.sequence_ids.tolist() == sequence_ids
    columns = [list(c) for c in zip(*targets, strict=True)]
    names = (
        "target_ids",
        "target_index",
        "sequence_index",
        "old_logprobs",
        "advantages",
        "loss_weight",
        "policy_version",
    )
    for name, column in zip(names, columns, strict=True):
        assert getattr(batch, name).tolist() == column, name
    assert batch.num_tokens == len(inputs) == sum(r.num_tokens for r in rows)
    assert batch.num_targets == len(targets)
    assert batch.temperature == 0.7


def test_layout_of_a_small_batch_by_hand():
    first = PackedSequence((20, 21, 22), (-1.0, -2.0, -3.0), 0.5, 0.1, 7)
    second = PackedSequence((30,), (-4.0,), -0.5, 0.2, 7)
    third = PackedSequence((40, 41), (-5.0, -6.0), 1.5, 0.3, 8)
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
    assert batch.index == -1
    assert not batch.first_of_rollout


def test_dtypes():
    batch = pack([row(2, 3, 1)], 1.0)
    for name in ("input_ids", "position_ids", "row_ids", "sequence_ids", "target_ids", "target_index"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.sequence_index.dtype == batch.policy_version.dtype == torch.int64
    assert batch.old_logprobs.dtype == batch.advantages.dtype == batch.loss_weight.dtype == torch.float32


@settings(max_examples=100)
@given(rows=rows_, count=st.sampled_from(MICRO_BATCHES))
def test_every_prompt_and_completion_is_recovered_exactly(rows, count):
    found = []
    for part in split_rows(rows, count):
        batch = pack(part, 1.0)
        ids, lengths, sequence, position = unpack(batch)
        expected = [(r.prompt_ids, s) for r in part for s in r.sequences]
        assert len(ids) == len(expected)
        for line, (prompt, s) in enumerate(expected):
            mine = sequence == line
            targets = batch.target_ids[mine].tolist()
            start = int(position[mine][0]) + 1
            length = int(lengths[line])
            assert ids[line, :start].tolist() == list(prompt)
            assert ids[line, start:length].tolist() == targets[:-1]
            assert position[mine].tolist() == list(range(start - 1, length))
            assert not ids[line, length:].any()
            assert tuple(targets) == s.token_ids
            assert tuple(batch.old_logprobs[mine].tolist()) == s.logprobs
            if s.weight or s.advantage:
                found.append((prompt, tuple(targets)))
    kept = sorted((r.prompt_ids, s.token_ids) for r in rows for s in r.sequences if s.weight or s.advantage)
    assert sorted(found) == kept


def test_empty_prompts_and_completions_are_refused():
    good = row(2, 3)
    with pytest.raises(ValueError, match="prompt of at least one token"):
        pack([good, replace(good, prompt_ids=())], 1.0)
    empty = replace(good.sequences[0], token_ids=(), logprobs=())
    with pytest.raises(ValueError, match="got 0 for 0"):
        pack([replace(good, sequences=(empty,))], 1.0)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_logprobs_must_match_tokens(count):
    wrong = replace(row(2, 3).sequences[0], logprobs=(-1.0,) * count)
    with pytest.raises(ValueError, match=f"got {count} for 3"):
        pack([Row((1,), (wrong,))], 1.0)


@settings(max_examples=100)
@given(rows=rows_, limit=st.integers(0, 200))
def test_first_rows_are_the_batch_of_the_first_rows(rows, limit):
    batch = pack(rows, 0.5).replace(index=3, first_of_rollout=True)
    fitting = 1
    while fitting < len(rows) and sum(r.num_tokens for r in rows[: fitting + 1]) <= limit:
        fitting += 1
    expected = pack(rows[:fitting], 0.5)
    part = batch.first_rows(limit)
    for name in vars(expected):
        value = getattr(expected, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(part, name), value), name
    assert (part.index, part.first_of_rollout, part.temperature) == (3, True, 0.5)
    assert torch.equal(batch.target_ids[: part.num_targets], part.target_ids)


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = pack([row(2, 3, 1)], 0.5).replace(index=2)
    moved = batch.to("meta")
    for name in vars(batch):
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta"
            assert value.device.type == "cpu"
    assert (moved.index, moved.temperature) == (2, 0.5)


def test_a_batch_cannot_be_changed_but_replaced():
    batch = pack([row(2, 3, 1)], 0.5)
    with pytest.raises(AttributeError, match="cannot be changed"):
        batch.old_logprobs = batch.old_logprobs.bfloat16()
    other = batch.replace(index=5)
    assert (batch.index, other.index) == (-1, 5)
    assert other.old_logprobs is batch.old_logprobs


def test_lightnings_bf16_conversion_leaves_the_stored_logprobs_alone():
    from lightning.pytorch.plugins import HalfPrecision

    batch = pack([row(2, 3, 1)], 0.5)
    converted = HalfPrecision("bf16-true").convert_input(batch)
    assert converted.old_logprobs.dtype == torch.float32
    assert converted.loss_weight.dtype == torch.float32


def test_a_batch_survives_pickling():
    batch = pack([row(2, 3, 1)], 0.5).replace(index=5)
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.old_logprobs, batch.old_logprobs)
    assert again.index == 5

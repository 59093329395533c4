import pickle
import re

import pytest
import torch
from fakes import make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import packable_rows

from grpo_lightning.errors import LedgerError, RolloutError
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.packing import pack


def row(prompt_length, *lengths):
    return make_row(range(prompt_length), [[1] * n for n in lengths], weight=0.25)


def test_banned_tokens_stay_with_the_batch():
    batch = pack([row(3, 2), row(2, 1)], 0.7, (4, 9))
    assert batch.banned_token_ids == batch.first_rows(1).banned_token_ids == batch.to("cpu").banned_token_ids == (4, 9)
    assert pack([row(3, 2)], 0.7).banned_token_ids == ()


@settings(max_examples=100, deadline=None)
@given(rows=packable_rows, limit=st.integers(0, 100))
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
            # The trainer has not said anything yet: NaN.
            assert torch.allclose(getattr(part, name), value, rtol=0, atol=0, equal_nan=True), name
    assert (part.index, part.first_of_rollout, part.temperature) == (3, True, 0.5)
    assert torch.equal(batch.target_ids[: part.num_targets], part.target_ids)


def test_targets_that_were_not_sampled_are_refused_with_their_sources():
    batch = pack([row(2, 3, 1)], 0.5)
    batch.require_sampled()
    source = batch.source.clone()
    source[0], source[1], source[3] = Source.FORCED, Source.FORCED, Source.ENVIRONMENT
    message = (
        "3 of 4 tokens in the loss were not sampled by the policy: 2 forced, 1 environment. Training on them would "
        "teach the policy what it never chose; only tokens of source 'sampled' may be targets"
    )
    with pytest.raises(LedgerError, match=f"^{re.escape(message)}$") as caught:
        batch.replace(source=source).require_sampled()
    assert isinstance(caught.value, RolloutError)


@pytest.mark.parametrize("source", [Source.PROMPT, Source.FORCED, Source.ENVIRONMENT])
def test_one_such_target_is_enough(source):
    batch = pack([row(2, 3, 1)], 0.5)
    changed = batch.source.clone()
    changed[2] = source
    with pytest.raises(LedgerError, match=f"1 of 4 tokens in the loss were not .*: 1 {source.name.lower()}\\."):
        batch.replace(source=changed).require_sampled()


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

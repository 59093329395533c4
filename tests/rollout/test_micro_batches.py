"""From the groups of a rollout to micro-batches: what is trained on is what was sampled, bit for bit."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import make_episode, make_group
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trajectories import located_by_hand, rollouts

from grpo_lightning.errors import ConfigurationError, RolloutError
from grpo_lightning.functional.aggregation import token_weights
from grpo_lightning.policy import unpack
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.rollout import Origin, make_rollouts
from grpo_lightning.rollout.types import SamplingSettings

SAMPLING = SamplingSettings(max_tokens=8, temperature=0.7, banned_token_ids=(97,))
ORIGIN = Origin(3, 1, 1, (0,), {})


def by_sequence(lengths):
    return token_weights(lengths, "sequence")


def by_token(lengths):
    return token_weights(lengths, "token")


def trained_episodes(groups):
    """``(group, index)`` of the episodes that have a reward, sampled tokens, and a sibling with both."""
    found = []
    for group in groups:
        acted = [any(not turn.action.was_forced for turn in e.turns) for e in group.episodes]
        mine = [i for i, e in enumerate(group.episodes) if e.reward is not None and acted[i]]
        found += [(id(group), i) for i in mine] if len(mine) > 1 else []
    return found


layouts = st.builds(Layout, st.just(1), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))


@settings(max_examples=100, deadline=None)
@given(groups=rollouts(), layout=layouts, aggregation=st.sampled_from([by_sequence, by_token]))
def test_what_is_trained_on_is_what_was_sampled(groups, layout, aggregation):
    trained = trained_episodes(groups)
    assume(trained)
    rows = located_by_hand(groups)
    parts = cut(groups, layout, aggregation, SAMPLING)
    assert [len(part) for part in parts] == [layout.micro_batches * layout.passes] * layout.processes
    times, weights = Counter(), Counter()
    for batch in (batch for part in parts for batch in part):
        batch.require_sampled()
        lines, _, line, position = unpack(batch)
        for target in range(batch.num_targets):
            group, episode, ledger, place = rows[batch.ledger_index[target]]
            assert ledger.source[place] == Source.SAMPLED
            assert batch.target_ids[target] == ledger.token_ids[place]
            assert batch.old_logprobs[target] == ledger.logprobs[place]
            assert batch.policy_version[target] == ledger.policy_version[place]
            turn = int(ledger.turn[place])
            assert batch.turn[target] == turn
            # What predicts it has seen the ledger up to the token before it, and stands on that.
            assert batch.input_ids[batch.target_index[target]] == ledger.token_ids[place - 1]
            assert position[target] == place - 1
            assert lines[line[target], :place].tolist() == ledger.token_ids[:place].tolist()
            if batch.loss_weight[target] > 0:
                assert batch.advantages[target] == group.advantages[episode][turn]
                times[int(batch.ledger_index[target])] += 1
                weights[id(group), episode] += float(batch.loss_weight[target])
            else:
                assert batch.advantages[target] == 0
    sampled = [i for i, (group, e, ledger, place) in enumerate(rows) if ledger.sampled[place]]
    expected = [i for i in sampled if (id(rows[i][0]), rows[i][1]) in trained]
    assert times == dict.fromkeys(expected, layout.passes)
    # In the order of ledger rows these are the tokens of the actions that the policy chose.
    actions = {(id(g), i): [t.action for t in e.turns] for g in groups for i, e in enumerate(g.episodes)}
    said = [t for key in trained for a in actions[key] if not a.was_forced for t in a.token_ids]
    assert [int(rows[i][2].token_ids[rows[i][3]]) for i in sorted(times)] == said
    # However an episode was split, its tokens weigh what those of one sequence of that length would.
    lengths = [sum(len(a.token_ids) for a in actions[key] if not a.was_forced) for key in trained]
    for key, length, weight in zip(trained, lengths, aggregation(lengths), strict=True):
        assert weights[key] == pytest.approx(layout.passes * length * weight, rel=1e-5)
    assert sum(weights.values()) == pytest.approx(layout.passes, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(groups=rollouts(), processes=st.integers(1, 3))
def test_the_rollout_keeps_the_engines_logprobs_apart(groups, processes):
    assume(trained_episodes(groups))
    first, *others = make_rollouts(ORIGIN, groups, Layout(1, 2, processes, 1), by_token, SAMPLING)
    expected = [ledger.logprobs[place] for _, _, ledger, place in located_by_hand(groups)]
    assert np.array_equal(first.stored.numpy(), expected, equal_nan=True)
    for batch in (batch for rollout in (first, *others) for batch in rollout.batches):
        stored = first.stored_logprobs(batch.ledger_index)
        assert stored.dtype == torch.float64
        assert torch.equal(stored.float(), batch.old_logprobs)
    assert first.groups == tuple(groups)
    assert all(rollout.groups == () and len(rollout.stored) == 0 for rollout in others)


def test_the_stored_logprobs_of_unknown_tokens_are_nan():
    episodes = [make_episode([5, 6], 1.0), make_episode([7], 0.0)]
    [rollout] = make_rollouts(ORIGIN, [make_group(episodes, [1.0, -1.0])], Layout(1, 1, 1, 1), by_token, SAMPLING)
    # Prompts of two tokens before each.
    found = rollout.stored_logprobs(torch.tensor([2, 3, 6, 0, 5, 7, -1, 1000]))
    assert found[:3].tolist() == pytest.approx([-0.15, -0.16, -0.17])
    assert found[3:].isnan().all()
    assert rollout.stored_logprobs(torch.tensor([], dtype=torch.int64)).shape == (0,)


def pair(prompt, tokens=(5, 6), rewards=(1.0, 0.0)):
    return make_group([make_episode(tokens, r, prompt=[prompt]) for r in rewards], [1.0, -1.0])


def test_updates_are_cut_apart_and_numbered_over_all_processes():
    groups = [pair(1), pair(2, (5,)), pair(3, (5, 6, 7)), pair(4)]
    parts = cut(groups, Layout(updates=2, micro_batches=2, processes=2, passes=2), by_token, SAMPLING)
    assert [[b.index for b in part] for part in parts] == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert [[b.first_of_rollout for b in part] for part in parts] == [[True] + [False] * 7] * 2
    for step, prompts in ((0, {1, 2}), (1, {3, 4})):
        for again in (0, 4):
            mine = [b for part in parts for b in part[2 * step + again : 2 * step + again + 2]]
            assert {int(b.input_ids[0]) for b in mine} == prompts
            assert sum(float(b.loss_weight.sum()) for b in mine) == pytest.approx(1.0)
    assert {(b.temperature, b.banned_token_ids) for part in parts for b in part} == {(0.7, (97,))}


def test_an_update_without_usable_groups_has_micro_batches_of_weight_0():
    groups = [pair(1, rewards=(None, 1.0)), pair(2)]
    [batches] = cut(groups, Layout(updates=2, micro_batches=3, processes=1, passes=1), by_token, SAMPLING)
    assert len(batches) == 6
    assert [float(b.loss_weight.sum()) > 0 for b in batches] == [False] * 3 + [True, True, False]
    # Its tokens are those of a real sequence, and the ledger says so.
    assert {int(b.ledger_index[0]) for b in batches[:3]} <= {7, 10}


def test_a_rollout_of_which_nothing_can_be_trained_on_is_refused_with_the_reasons():
    slow, broken = (
        replace(make_episode([5], None), failure=reason) for reason in ("the judge was slow", "reset raised")
    )
    groups = [make_group([slow, slow, make_episode([5])], [0.0] * 3), make_group([broken], [0.0])]
    message = (
        "none of the 2 groups can be trained on: each needs two episodes with a reward. "
        "2 x the judge was slow; 1 x reset raised"
    )
    with pytest.raises(RolloutError, match=message):
        cut(groups, Layout(1, 1, 1, 1), by_token, SAMPLING)


def test_another_accumulation_is_refused():
    layout = Layout(1, 4, 1, 1)
    layout.check_accumulation(4)
    message = "expected 4 micro-batches per optimizer step, .*accumulate_grad_batches is 2 by now"
    with pytest.raises(ConfigurationError, match=message):
        layout.check_accumulation(2)


def test_a_rollout_that_is_masked_altogether_says_so():
    episodes = [replace(make_episode([5, 6], reward), masked=True) for reward in (0.0, 1.0)]
    with pytest.raises(RolloutError, match="2 of 2 episodes were cut off by a limit, which mask_truncated keeps out"):
        cut([make_group(episodes, [-1.0, 1.0])], Layout(1, 1, 1, 1), by_sequence, SAMPLING)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_update_that_is_masked_altogether_has_fillers(micro_batches):
    groups = [
        make_group([replace(make_episode([5, 6], r), masked=masked) for r in (0.0, 1.0)], [-1.0, 1.0])
        for masked in (False, True)
    ]
    [batches] = cut(groups, Layout(2, micro_batches, 1, 1), by_sequence, SAMPLING)
    assert len(batches) == 2 * micro_batches
    assert sum(float(batch.loss_weight.sum()) for batch in batches[:micro_batches]) == pytest.approx(1)
    assert all((batch.loss_weight == 0).all() for batch in batches[micro_batches:])

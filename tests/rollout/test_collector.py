import asyncio
import dataclasses
import math
import random

import pytest
from fakes import FakeEngine, make_group, make_sample, make_task, random_generation
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.errors import LogprobValidationError, RewardError
from grpo_lightning.functional import group_advantages
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.collector import collect, request_seed, to_action, with_advantages
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.types import Generation, SamplingSettings

SAMPLING = SamplingSettings(max_tokens=6, temperature=0.9, stop_token_ids=(1,))
TASKS = [(make_task(f"t{i}", answer=str(i)), [10 + i, 20, 30 + i]) for i in range(4)]


def decode(ids):
    return " ".join(map(str, ids))


@pytest.fixture
def gather():
    engines = []

    def gather(generation=random_generation, reward=len, tasks=TASKS, samples=3, **settings):
        engine = FakeEngine(generation)
        engines.append(engine)
        engine.start(EngineSpec("none", 8, 100, 100))
        scorer = reward if isinstance(reward, Scorer) else Scorer([reward])
        arguments = {"seed_key": "0/0", **settings}
        coroutine = collect(
            engine, tasks, samples_per_task=samples, sampling=SAMPLING, scorer=scorer, decode=decode, **arguments
        )
        return engine.run(asyncio.wait_for(coroutine, timeout=30)), engine

    yield gather
    for engine in engines:
        engine.close()


def test_one_group_a_task_in_order(gather):
    groups, engine = gather()
    assert [g.task.id for g in groups] == ["t0", "t1", "t2", "t3"]
    assert [g.prompt_ids for g in groups] == [tuple(p) for _, p in TASKS]
    assert all(len(g.samples) == 3 and g.advantages == () for g in groups)
    assert len(engine.calls) == 12
    assert {(params, adapter.name) for _, params, _, adapter, _ in engine.requests} == {(SAMPLING, "CURRENT")}


def test_nothing_to_collect(gather):
    assert gather(tasks=[])[0] == []


def test_every_value_belongs_to_its_own_turn(gather):
    # The finishing order is random, and every value names its episode.
    async def generation(prompt, params, seed, version):
        await asyncio.sleep(random.uniform(0, 0.05))
        tokens = (prompt[0], seed % 1000, seed // 1000)
        return Generation(tokens, tuple(-t / 1e7 for t in tokens), "length", version)

    async def reward(completion, answer):
        await asyncio.sleep(random.uniform(0, 0.05))
        return float(completion.split()[1]) + 1000 * float(answer)

    groups, _ = gather(generation, reward, samples=8)
    for group, (task, prompt) in zip(groups, TASKS, strict=True):
        assert group.task is task
        for number, sample in enumerate(group.samples):
            seed = request_seed("0/0", task.id, number)
            tokens = (prompt[0], seed % 1000, seed // 1000)
            assert sample.action.token_ids == tokens
            assert sample.action.token_logprobs == tuple(-t / 1e7 for t in tokens)
            assert sample.action.logprob_sum == pytest.approx(sum(-t / 1e7 for t in tokens))
            assert sample.action.text == decode(tokens)
            assert sample.reward == sample.rewards["reward"] == seed % 1000 + 1000 * int(task.data["answer"])
            assert not sample.action.was_forced


@pytest.mark.parametrize("kind", ["sample", "action", "group"])
def test_what_was_sampled_cannot_be_changed(gather, kind):
    group = gather()[0][0]
    holder, name = {
        "sample": (group.samples[0], "reward"),
        "action": (group.samples[0].action, "token_logprobs"),
        "group": (group, "samples"),
    }[kind]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(holder, name, None)
    assert isinstance(group.samples[0].action.token_logprobs, tuple)


def test_action_of_a_generation():
    action = to_action(Generation((4, 5), (-0.25, -0.5), "length", 7), decode)
    assert dataclasses.asdict(action) == {
        "text": "4 5",
        "token_ids": (4, 5),
        "token_logprobs": (-0.25, -0.5),
        "logprob_sum": -0.75,
        "was_forced": False,
        "finish_reason": "length",
        "policy_version": 7,
    }


def test_unscored_samples_keep_their_reason(gather):
    def picky(completion):
        if completion.count(" ") % 2:
            raise ValueError("odd")
        return 1.0

    samples = [s for g in gather(reward=Scorer([picky], on_error="skip"), samples=10)[0] for s in g.samples]
    failed = [s for s in samples if s.reward is None]
    assert failed
    assert len(failed) < len(samples)
    assert all("raised ValueError: odd" in s.failure for s in failed)
    assert all(s.failure is None and s.reward == 1.0 for s in samples if s not in failed)


def test_on_sample_sees_every_sample_once(gather):
    seen = []
    groups, _ = gather(on_sample=seen.append)
    assert sorted(map(id, seen)) == sorted(id(s) for g in groups for s in g.samples)


def test_all_episodes_are_in_flight_at_once(gather):
    in_flight, all_there = 0, asyncio.Event()

    async def generation(prompt, params, seed, version):
        nonlocal in_flight
        in_flight += 1
        if in_flight == 4 * 16:
            all_there.set()
        await all_there.wait()
        return random_generation(prompt, params, seed, version)

    gather(generation, samples=16)
    assert in_flight == 64


def test_one_slow_episode_delays_nobody(gather):
    done = []
    slow_prompt = TASKS[0][1]
    others_done = asyncio.Event()

    async def generation(prompt, params, seed, version):
        if list(prompt) == slow_prompt and seed == request_seed("0/0", "t0", 0):
            # Ends only when all others have been generated and scored.
            await others_done.wait()
        return random_generation(prompt, params, seed, version)

    def on_sample(sample):
        done.append(sample)
        if len(done) == 11:
            others_done.set()

    groups, _ = gather(generation, on_sample=on_sample)
    assert len(done) == 12
    assert done[-1] is groups[0].samples[0]


def test_a_slow_reward_delays_only_its_own_episode(gather):
    scored = []
    others_done = asyncio.Event()

    async def reward(completion, task_id):
        if task_id == "t2":
            await others_done.wait()
        return 0.0

    def on_sample(sample):
        scored.append(sample)
        if len(scored) == 9:
            others_done.set()

    groups, engine = gather(reward=reward, on_sample=on_sample)
    assert len(engine.calls) == 12
    assert set(map(id, scored[-3:])) == {id(s) for s in groups[2].samples}


def test_first_failure_cancels_the_rest_and_is_raised_as_it_is(gather):
    error = OSError("the engine is gone")
    cancelled = []

    async def generation(prompt, params, seed, version):
        if seed == request_seed("0/0", "t1", 1):
            await asyncio.sleep(0.02)
            raise error
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(seed)
            raise

    with pytest.raises(OSError, match="the engine is gone") as caught:
        gather(generation)
    assert caught.value is error
    assert len(cancelled) == 11


def test_a_failing_reward_stops_the_rollout_with_its_cause(gather):
    def reward(completion, task_id):
        if task_id == "t3":
            raise KeyError("my own bug")
        return 1.0

    with pytest.raises(RewardError, match="raised KeyError: 'my own bug' on task 't3'") as caught:
        gather(reward=reward)
    # Without its cause nobody sees which line of the reward function failed.
    assert isinstance(caught.value.__cause__, KeyError)


def test_wrong_logprobs_stop_the_rollout(gather):
    def generation(prompt, params, seed, version):
        return Generation((5, 6), (-1.0, math.nan if prompt[0] == 12 else -1.0), "length", version)

    with pytest.raises(LogprobValidationError, match="task 't2'"):
        gather(generation)


def test_nothing_is_scored_before_it_was_validated(gather):
    scored = []

    def reward(completion):
        scored.append(completion)
        return 0.0

    with pytest.raises(LogprobValidationError):
        gather(lambda prompt, params, seed, version: Generation((5,), (), "stop", version), reward)
    assert scored == []


def test_many_failures_raise_one_and_no_group(gather):
    async def generation(prompt, params, seed, version):
        raise RuntimeError(f"seed {seed}")

    with pytest.raises(RuntimeError, match="seed") as caught:
        gather(generation)
    assert not isinstance(caught.value, ExceptionGroup)


def test_a_failing_on_sample_is_a_failure(gather):
    def on_sample(sample):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gather(on_sample=on_sample)


def seeds(engine):
    return {prompt: sorted(s for p, _, s, _, _ in engine.requests if p == prompt) for prompt, *_ in engine.requests}


def test_same_key_same_rollout(gather):
    (first, one), (second, two) = gather(), gather()
    assert first == second
    assert seeds(one) == seeds(two)


def test_other_key_other_seeds(gather):
    one, two = gather()[1], gather(seed_key="0/1")[1]
    assert not {s for v in seeds(one).values() for s in v} & {s for v in seeds(two).values() for s in v}


def test_a_task_that_comes_twice_is_sampled_anew(gather):
    groups, engine = gather(tasks=[TASKS[0], TASKS[0]])
    flat = [seed for values in seeds(engine).values() for seed in values]
    assert len(flat) == len(set(flat)) == sum(len(g.samples) for g in groups)


def test_seeds_depend_on_task_and_number_only(gather):
    everything = seeds(gather()[1])
    some = seeds(gather(tasks=[TASKS[3], TASKS[1]])[1])
    more = seeds(gather(tasks=TASKS[::-1], samples=5)[1])
    for prompt, values in some.items():
        assert values == everything[prompt]
    for prompt, values in everything.items():
        assert set(values) < set(more[prompt])


def test_all_seeds_of_a_rollout_differ(gather):
    engine = gather(tasks=[(make_task(f"t{i}"), [i]) for i in range(40)], samples=16)[1]
    assert len({s for _, _, s, _, _ in engine.requests}) == 640


@given(parts=st.lists(st.text(max_size=5) | st.integers(), min_size=1, max_size=4))
def test_seeds_are_31_bit_and_repeat(parts):
    seed = request_seed(*parts)
    assert 0 <= seed < 2**31
    assert seed == request_seed(*parts)


def test_seeds_are_the_same_in_every_process():
    assert request_seed("0/0", "t0", 0) == 1494471627


def test_parts_of_a_seed_are_told_apart():
    assert len({request_seed("1", "23"), request_seed("12", "3"), request_seed("123"), request_seed("3", "12")}) == 4


def advantages_by_loops(rewards):
    """Population standard deviation plus 1e-4, over the scored samples."""
    scored = [r for r in rewards if r is not None]
    if not scored or min(scored) == max(scored):
        return [0.0] * len(rewards)
    mean = math.fsum(scored) / len(scored)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in scored) / len(scored))
    return [0.0 if r is None else (r - mean) / (std + 1e-4) for r in rewards]


@settings(max_examples=60)
@given(
    table=st.integers(2, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.none() | st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0]), min_size=size, max_size=size),
            min_size=1,
            max_size=5,
        )
    )
)
def test_advantages_equal_the_loops(table):
    groups = [make_group([i], [make_sample([1, 2], r) for r in rewards]) for i, rewards in enumerate(table)]
    result = with_advantages(groups)
    for before, after, rewards in zip(groups, result, table, strict=True):
        assert after.advantages == pytest.approx(advantages_by_loops(rewards), abs=1e-9)
        assert after.samples == before.samples
        assert (after.task, after.prompt_ids) == (before.task, before.prompt_ids)
        assert before.advantages == ()


def test_advantages_are_those_of_the_functional():
    import torch

    rewards = [[1.0, 0.0, 0.25], [0.5, 0.5, 0.5]]
    groups = [make_group([1], [make_sample([1], r) for r in row]) for row in rewards]
    expected = group_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    assert [list(g.advantages) for g in with_advantages(groups)] == expected

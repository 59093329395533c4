"""The model of an epoch on larger machines, with numbers worked by hand."""

import json
from dataclasses import replace

import pytest

from benchmarks.marked import inserted
from benchmarks.scaling.__main__ import PAGE
from benchmarks.scaling.model import (
    Epoch,
    batch_of,
    collector_limit,
    collector_seconds,
    decode_seconds,
    decode_step_seconds,
    epoch,
    gradient_seconds,
    packing_seconds,
    pass_seconds,
    prefill_seconds,
    saturating_servers,
    sleep_seconds,
    sync_seconds,
)
from benchmarks.scaling.parts import (
    A100,
    H100,
    IDEAL,
    QWEN_1_5B,
    QWEN_7B,
    SMOLLM_135M,
    Accelerator,
    Architecture,
    Cluster,
    HostCosts,
    Workload,
)
from benchmarks.scaling.scenarios import DEMO, MEASURED, SCENARIOS, host_costs
from benchmarks.scaling.table import markdown, purchases, sweep

TOY = Architecture("toy", 2, 4, 2, 1, 2, 8, 10, tied=True)
WORK = Workload(prompts=2, samples=2, prompt_tokens=5, completion_tokens=4, longest=6, updates=2)
CHIP = Accelerator("chip", flops=1000, bandwidth=100, memory=10_000)
CLUSTER = Cluster(2, 2, CHIP, gradient_link=100, storage=100, host_link=100)
GIVEN = replace(IDEAL, block=4, batch=4, memory_share=1, rank=3, load=0.5)
HOST = HostCosts(episode=0.5, sampled_token=0.25, packed_token=0.1, handed_token=0.2)


def test_an_architecture():
    # A layer: 2 * 4 * 2 * (2 + 1) of attention and 3 * 4 * 8.
    assert (TOY.linear, TOY.head, TOY.parameters, replace(TOY, tied=False).parameters) == (288, 40, 328, 368)
    # Keys and values, 2 layers, 1 head of 2, 2 bytes.
    assert TOY.cache_bytes() == 16
    # In and out of q and o, of k and v, of the three of the feed-forward part; 2 layers, rank 3.
    assert TOY.adapter_parameters(3) == (2 * 8 + 2 * 6 + 3 * 12) * 2 * 3


@pytest.mark.parametrize(("arch", "billions"), [(QWEN_7B, 7.61), (QWEN_1_5B, 1.54), (SMOLLM_135M, 0.1345)])
def test_real_architectures_have_the_parameters_that_their_cards_say(arch, billions):
    assert arch.parameters == pytest.approx(1e9 * billions, rel=0.005)


def test_the_adapter_of_the_demo_has_as_many_weights_as_peft_makes():
    # 9 heads of 64 are the width; each layer's in and out: q, o 1152; k, v 768; the other three 2112.
    assert SMOLLM_135M.adapter_parameters(16) == 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112) == 4_884_480


def test_a_workload():
    assert (WORK.sequences, WORK.sampled_tokens, WORK.input_tokens) == (4, 16, 26)
    # A prompt sees itself, 5 * 5 / 2; each completion the prompt, 20, and itself, 8.
    assert WORK.pairs == 2 * (12.5 + 2 * 28)


def test_decoding_is_bound_by_what_is_read_or_by_what_is_computed():
    # Weights 656 bytes, cache 2 * 7 * 16; operations 2 * (2 * 328 + 4 * 8 * 7).
    assert decode_step_seconds(TOY, CLUSTER, 2, 7, GIVEN) == pytest.approx(880 / 100)
    slow = replace(CLUSTER, accelerator=replace(CHIP, flops=100))
    assert decode_step_seconds(TOY, slow, 2, 7, GIVEN) == pytest.approx(1760 / 100)
    shared = replace(GIVEN, bandwidth_share=0.5, adapter_cost=1.2)
    assert decode_step_seconds(TOY, CLUSTER, 2, 7, shared) == pytest.approx(1.2 * 880 / 50)


@pytest.mark.parametrize(("memory", "batch"), [(10_000, 4), (900, 2), (768, 1)])
def test_a_batch_is_what_is_allowed_or_what_the_cache_holds(memory, batch):
    cluster = replace(CLUSTER, accelerator=replace(CHIP, memory=memory))
    assert batch_of(TOY, cluster, 7, GIVEN) == batch


def test_a_model_that_leaves_no_room_is_refused():
    cluster = replace(CLUSTER, accelerator=replace(CHIP, memory=767))
    with pytest.raises(ValueError, match="expected room for a sequence of 7 tokens beside toy, but there is none"):
        batch_of(TOY, cluster, 7, GIVEN)


@pytest.mark.parametrize(
    ("change", "tokens"), [({}, 2 * (4 + 2)), ({"prompts_shared": False}, 20), ({"block": 5}, 20), ({"block": 1}, 12)]
)
def test_whole_blocks_of_a_prompt_are_shared(change, tokens):
    # Two servers; a token costs 2 * 288 + 2 * 8 * 5.
    seconds = prefill_seconds(TOY, CLUSTER, WORK, replace(GIVEN, **change))
    assert seconds == pytest.approx(tokens / 2 * 656 / 1000)


def test_decoding_is_full_batches_and_a_tail():
    # Two sequences a server, 4 steps at a mean context of 7; then 2 steps of one sequence at 10 tokens.
    assert decode_seconds(TOY, CLUSTER, WORK, GIVEN) == pytest.approx(4 * 8.8 + 2 * 8.16)
    # A batch of one takes twice the steps, each 6.56 + 1.12.
    assert decode_seconds(TOY, CLUSTER, WORK, replace(GIVEN, batch=1)) == pytest.approx(8 * 7.68 + 2 * 8.16)
    assert decode_seconds(TOY, replace(CLUSTER, servers=99), WORK, GIVEN) == pytest.approx(4 * 7.68 + 2 * 8.16)


def test_the_first_process():
    assert collector_seconds(WORK, HOST) == 4 * 0.5 + 16 * 0.25
    # 36 tokens of sequences; half of the 26 packed ones are for the other process.
    assert packing_seconds(CLUSTER, WORK, HOST) == pytest.approx(3.6 + 2.6)
    assert packing_seconds(replace(CLUSTER, trainers=1), WORK, HOST) == pytest.approx(3.6)
    assert collector_limit(HOST, 4) == pytest.approx(4 / 1.5)


def test_passes_of_the_trainer():
    # 26 tokens through 288 weights, 16 through 40, 137 pairs of 8.
    forward = (2 * 288 * 26 + 2 * 40 * 16 + 4 * 8 * 137) / 2000
    assert pass_seconds(TOY, CLUSTER, WORK, GIVEN, training=False) == pytest.approx(forward) == pytest.approx(10.32)
    assert pass_seconds(TOY, CLUSTER, WORK, GIVEN, training=True) == pytest.approx(22.832)
    again = replace(GIVEN, checkpointing=True)
    assert pass_seconds(TOY, CLUSTER, WORK, again, training=True) == pytest.approx(32.512)
    half = replace(GIVEN, train_share=0.5, balance=0.8)
    assert pass_seconds(TOY, CLUSTER, WORK, half, training=True) == pytest.approx(22.832 / 0.4)


def test_what_is_moved():
    # 384 weights of 4 bytes: a ring of two moves them once an update; one writes and two read.
    assert gradient_seconds(TOY, CLUSTER, WORK, GIVEN) == pytest.approx(2 * 1536 / 100)
    assert gradient_seconds(TOY, replace(CLUSTER, trainers=1), WORK, GIVEN) == 0
    assert sync_seconds(TOY, CLUSTER, GIVEN) == pytest.approx(3 * 1536 / 100 + 0.5)
    assert sleep_seconds(TOY, CLUSTER, GIVEN) == 0
    together = replace(CLUSTER, colocated=True)
    assert sleep_seconds(TOY, together, GIVEN) == pytest.approx(2 * 656 / 100)
    assert sleep_seconds(TOY, together, replace(GIVEN, sleeps=False)) == 0


def test_an_epoch_in_turn_and_ahead():
    found = epoch(TOY, CLUSTER, WORK, GIVEN, HOST)
    assert found == Epoch(
        *map(pytest.approx, (3.936 + 51.52, 6.0, 6.2, 0.0, 22.832, 30.72, 46.58, 0.0)), colocated=False
    )
    assert found.bound == "engine"
    assert found.in_turn == pytest.approx(55.456 + 59.752 + 46.58)
    # Training, 6.2 + 22.832 + 30.72, hides the rollout.
    assert found.ahead == pytest.approx(59.752 + 46.58)
    assert epoch(TOY, CLUSTER, WORK, replace(GIVEN, scores=True), HOST).training == pytest.approx(59.752 + 10.32)


def test_engines_that_take_turns_with_trainers_overlap_nothing():
    found = epoch(TOY, replace(CLUSTER, colocated=True), WORK, GIVEN, HOST)
    assert found.ahead is None
    assert found.in_turn == pytest.approx(55.456 + 59.752 + 46.58 + 13.12)


def test_a_collector_that_is_slower_than_the_engines_bounds_the_rollout():
    slow = replace(HOST, episode=20.0)
    found = epoch(TOY, CLUSTER, WORK, GIVEN, slow)
    assert (found.bound, found.rollout) == ("collector", 84.0)


def test_servers_beyond_which_the_collector_is_the_bound():
    # Two sequences on two servers take 55.456; on one, all four: prefill 7.872, decoding 4 * (6.56 + 4.48) + 16.32.
    assert epoch(TOY, replace(CLUSTER, servers=1), WORK, GIVEN, HOST).engine == pytest.approx(68.352)
    assert saturating_servers(TOY, CLUSTER, WORK, GIVEN, replace(HOST, episode=15.0)) == 2
    assert saturating_servers(TOY, CLUSTER, WORK, GIVEN, replace(HOST, episode=17.0)) == 1
    assert saturating_servers(TOY, CLUSTER, WORK, GIVEN, HOST, most=50) is None


def test_published_figures():
    assert (H100.flops, H100.bandwidth, A100.flops, A100.bandwidth) == (989e12, 3.35e12, 312e12, 2.0e12)


def test_what_helps_is_what_is_slower():
    long = SCENARIOS[0]
    few, many = (replace(long, cluster=replace(long.cluster, servers=n)) for n in (2, 64))
    assert purchases([few], MEASURED).endswith("| servers |")
    assert purchases([many], MEASURED).endswith("| trainers |")
    assert "| rollout |" in sweep(long, MEASURED).splitlines()[2]
    assert "| training |" in sweep(long, MEASURED).splitlines()[-1]


def test_the_demo_is_no_faster_than_the_arithmetic_allows():
    found = DEMO.epoch(MEASURED)
    assert found.rollout < 9.4
    assert found.training < 9.6


def test_costs_come_from_the_measurements_where_there_are_any(tmp_path):
    assert host_costs(tmp_path / "none.json") == (MEASURED, False)
    stored = tmp_path / "performance.json"
    stored.write_text(json.dumps({"collector_us_per_episode": 900.0}))
    assert host_costs(stored) == (replace(MEASURED, episode=pytest.approx(9e-4)), False)
    keys = {"collector_us_per_episode": 900, "collector_us_per_sampled_token": 2, "packing_us_per_token": 0.5}
    stored.write_text(json.dumps({**keys, "sections": {}}))
    expected = replace(
        MEASURED,
        **{
            k: pytest.approx(v)
            for k, v in zip(("episode", "sampled_token", "packed_token"), (9e-4, 2e-6, 5e-7), strict=True)
        },
    )
    assert host_costs(stored) == (expected, True)


def test_the_page_shows_what_the_model_says():
    page = PAGE.read_text("utf-8")
    assert page == inserted(page, "scaling", f"\n{markdown(*host_costs())}"), "run python -m benchmarks.scaling"

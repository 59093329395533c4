import asyncio
import math
import threading
from pathlib import Path

import pytest
import torch
from fakes import EOS_ID, TINY_VOCABULARY, decode, encode, end_by, likeliest

from grpo_lightning.errors import ConfigurationError, RolloutError
from grpo_lightning.rollout.engine import EngineSpec, RolloutEngine
from grpo_lightning.rollout.player import request_seed
from grpo_lightning.rollout.transformers_engine import TransformersEngine, _pick
from grpo_lightning.rollout.types import AdapterRef, Generation, SamplingSettings

PROMPTS = [encode(text) for text in ("user: What is 3 + 4?\nassistant: ", "a", "hello there", "1 + 1 = ")]


def spec(model, **changes):
    return EngineSpec(**{"model": model, "lora_rank": 4, "max_length": 200, "max_concurrency": 64, **changes})


@pytest.fixture
def make_engine():
    engines = []

    def make(model, **settings):
        engine = TransformersEngine(**{"dtype": "float32", **settings})
        engines.append(engine)
        engine.start(spec(model))
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=["tiny_model", "tiny_qwen3"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def engine(make_engine, tiny_model):
    return make_engine(tiny_model)


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """Three different adapters of the tiny model, strong enough to change its mind."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    refs = []
    for version in range(3):
        path = tmp_path_factory.mktemp("adapters") / f"v{version}"
        save_random_adapter(get_peft_model, LoraConfig, AutoModelForCausalLM, tiny_model, path, version)
        refs.append(AdapterRef(f"run-{version}-x", version + 1, path, version))
    return refs


def save_random_adapter(get_peft_model, config_class, model_class, model: str, path: Path, seed: int, targets=None):
    base = model_class.from_pretrained(model, dtype=torch.float32)
    config = config_class(r=4, lora_alpha=8, target_modules=targets or "all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    peft_model.save_pretrained(path)


def plain(model, adapter=None):
    """The model as transformers and PEFT load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return base if adapter is None else PeftModel.from_pretrained(base, adapter.path).eval()


@torch.no_grad()
def plain_logprobs(model, prompt, tokens, temperature=1.0):
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    logp = (logits / temperature).log_softmax(-1)
    return [float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(tokens)]


def generate(engine, prompts, params, seeds=None, **settings) -> list[Generation]:
    async def together():
        return await asyncio.gather(
            *[
                engine.generate(p, params, seed=None if seeds is None else seeds[i], **settings)
                for i, p in enumerate(prompts)
            ]
        )

    return engine.run(together())


def differ(first: Generation, second: Generation) -> bool:
    return first.token_ids != second.token_ids or not math.isclose(first.logprobs[0], second.logprobs[0], abs_tol=1e-3)


def same(first: list[Generation], second: list[Generation]) -> bool:
    """Equal but for the last digits of the logprobs."""
    tokens = [(g.token_ids, g.finish_reason, g.policy_version) for g in first]
    return tokens == [(g.token_ids, g.finish_reason, g.policy_version) for g in second] and all(
        close(a.logprobs, b.logprobs, 1e-5) for a, b in zip(first, second, strict=True)
    )


def close(first, second, tolerance):
    return first == pytest.approx(second, abs=tolerance)


def test_satisfies_the_protocol(engine):
    assert isinstance(engine, RolloutEngine)
    assert engine.policy_version == -1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_transformers_greedy(make_engine, model, prompt):
    engine, reference = make_engine(model), plain(model)
    [result] = generate(engine, [prompt], SamplingSettings(24, 0.0, (EOS_ID,)))
    expected = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=24
    )[0, len(prompt) :].tolist()
    assert list(result.token_ids) == expected
    assert close(result.logprobs, plain_logprobs(reference, prompt, result.token_ids), 1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_are_those_of_a_plain_forward(make_engine, model, temperature):
    engine, reference = make_engine(model), plain(model)
    results = generate(engine, PROMPTS, SamplingSettings(20, temperature, (EOS_ID,)), seeds=range(4))
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert close(result.logprobs, plain_logprobs(reference, prompt, result.token_ids, temperature), 1e-5)


def test_same_seeds_same_batch_same_everything(engine, make_engine, tiny_model):
    params = SamplingSettings(20, 1.0, (EOS_ID,))
    first = generate(engine, PROMPTS, params, seeds=[5, 6, 7, 8])
    assert same(generate(engine, PROMPTS, params, seeds=[5, 6, 7, 8]), first)
    assert same(generate(make_engine(tiny_model), PROMPTS, params, seeds=[5, 6, 7, 8]), first)


def test_other_seeds_other_tokens(engine):
    results = generate(engine, [PROMPTS[0]] * 20, SamplingSettings(10), seeds=range(20))
    assert len({r.token_ids for r in results}) == 20


def test_equal_seeds_give_equal_samples_in_one_batch(engine):
    results = generate(engine, [PROMPTS[0]] * 3, SamplingSettings(10), seeds=[3, 3, 4])
    assert results[0].token_ids == results[1].token_ids != results[2].token_ids


def test_without_seed_every_sample_differs(engine):
    assert len({r.token_ids for r in generate(engine, [PROMPTS[0]] * 8, SamplingSettings(12))}) == 8


def test_sampling_leaves_the_global_random_state_alone(engine):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    generate(engine, PROMPTS, SamplingSettings(4), seeds=range(4))
    assert torch.rand(1) == expected


def test_padded_batch_equals_one_at_a_time(make_engine, model):
    engine = make_engine(model)
    params = SamplingSettings(20, 0.9, (EOS_ID,))
    together = generate(engine, PROMPTS, params, seeds=range(4))
    for i, prompt in enumerate(PROMPTS):
        [alone] = generate(engine, [prompt], params, seeds=[i])
        assert alone.token_ids == together[i].token_ids
        assert close(alone.logprobs, together[i].logprobs, 1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_small_batches_give_the_same(make_engine, tiny_model, engine, size):
    params = SamplingSettings(8, 1.0, (EOS_ID,))
    prompts = PROMPTS * 2
    expected = generate(engine, prompts, params, seeds=range(8))
    widths = []
    small = make_engine(tiny_model, max_batch_size=size)
    sample = small._sample
    small._sample = lambda batch: (widths.append(len(batch)), sample(batch))[1]
    results = generate(small, prompts, params, seeds=range(8))
    assert [r.token_ids for r in results] == [e.token_ids for e in expected]
    assert max(widths) == size
    assert sum(widths) == 8


def test_requests_that_come_together_are_sampled_together(engine):
    widths = []
    sample = engine._sample
    engine._sample = lambda batch: (widths.append(len(batch)), sample(batch))[1]
    generate(engine, PROMPTS * 4, SamplingSettings(2), seeds=range(16))
    assert widths == [16]


def test_settings_are_not_mixed_in_one_batch(engine):
    async def mixed():
        short, long, greedy = SamplingSettings(2), SamplingSettings(5), SamplingSettings(5, 0.0)
        return await asyncio.gather(
            engine.generate(PROMPTS[0], short, seed=1),
            engine.generate(PROMPTS[0], long, seed=1),
            engine.generate(PROMPTS[0], greedy, seed=1),
            engine.generate(PROMPTS[1], short, seed=2),
        )

    a, b, c, d = engine.run(mixed())
    assert [len(r.token_ids) for r in (a, b, c, d)] == [2, 5, 5, 2]
    assert b.token_ids[:2] == a.token_ids
    assert c.token_ids == generate(engine, [PROMPTS[0]], SamplingSettings(5, 0.0))[0].token_ids


def test_sampled_frequencies_are_the_probabilities(engine, tiny_model):
    count, temperature = 2000, 0.5
    prompt = PROMPTS[0]
    params = SamplingSettings(1, temperature)
    results = generate(engine, [prompt] * count, params, seeds=[request_seed("frequencies", i) for i in range(count)])
    observed = torch.bincount(torch.tensor([r.token_ids[0] for r in results]), minlength=len(TINY_VOCABULARY))
    with torch.no_grad():
        logits = plain(tiny_model)(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1) * count
    # Rare tokens are counted together.
    common = expected >= 5
    seen = torch.cat([observed[common].double(), observed[~common].sum()[None].double()])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    freedom = len(wanted) - 1
    assert freedom > 20
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    # The test has power: a temperature of 0.7 would be noticed.
    flat = (logits / 0.7).softmax(-1) * count
    other = torch.cat([flat[common], flat[~common].sum()[None]])
    assert float(((seen - other) ** 2 / other).sum()) > freedom + 8 * math.sqrt(2 * freedom)


def test_stop_tokens_end_a_completion_and_are_part_of_it(engine):
    stops = tuple(range(1, 20))
    params = SamplingSettings(30, 1.0, stops)
    results = generate(engine, PROMPTS * 5, params, seeds=range(20))
    stopped = [r for r in results if r.finish_reason == "stop"]
    assert len({len(r.token_ids) for r in stopped}) > 3
    for result in results:
        assert len(result.logprobs) == len(result.token_ids) <= 30
        assert not set(result.token_ids[:-1]) & set(stops)
        assert (result.token_ids[-1] in stops) == (result.finish_reason == "stop")
        if result.finish_reason == "length":
            assert len(result.token_ids) == 30


def test_who_stops_first_does_not_disturb_the_others(engine):
    free = generate(engine, PROMPTS, SamplingSettings(15), seeds=range(4))
    stop = free[0].token_ids[3]
    stopping = generate(engine, PROMPTS, SamplingSettings(15, 1.0, (stop,)), seeds=range(4))
    for unlimited, result in zip(free, stopping, strict=True):
        end = unlimited.token_ids.index(stop) + 1 if stop in unlimited.token_ids else 15
        assert result.token_ids == unlimited.token_ids[:end]
        assert close(result.logprobs, unlimited.logprobs[:end], 1e-4)
    assert stopping[0].finish_reason == "stop"


def test_without_stop_tokens_length_is_the_limit(engine):
    for result in generate(engine, PROMPTS, SamplingSettings(9), seeds=range(4)):
        assert len(result.token_ids) == 9
        assert result.finish_reason == "length"


def test_a_stop_token_in_the_last_place_is_a_stop(engine):
    [free] = generate(engine, [PROMPTS[0]], SamplingSettings(4, 0.0))
    stop = free.token_ids[-1]
    first = free.token_ids.index(stop) + 1
    [result] = generate(engine, [PROMPTS[0]], SamplingSettings(first, 0.0, (stop,)))
    assert result.token_ids == free.token_ids[:first]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_texts_end_a_completion_with_the_token_that_completes_them(engine, temperature):
    free = generate(engine, PROMPTS, SamplingSettings(20, temperature), seeds=range(4))
    # Two tokens of the first completion, one of the second.
    stops = (decode(free[0].token_ids)[5:7], decode(free[1].token_ids)[9:10])
    params = SamplingSettings(20, temperature, stop=stops)
    results = generate(engine, PROMPTS, params, seeds=range(4))
    for unlimited, result in zip(free, results, strict=True):
        end = end_by(stops, unlimited.token_ids)
        assert result.token_ids == unlimited.token_ids[:end]
        assert result.finish_reason == ("length" if end is None else "stop")
        assert close(result.logprobs, unlimited.logprobs[:end], 1e-4)
    assert results[0].finish_reason == results[1].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_banned_tokens_are_not_sampled_and_not_in_the_softmax(engine, tiny_model, temperature):
    free = generate(engine, PROMPTS, SamplingSettings(30, temperature), seeds=range(4))
    banned = tuple(sorted({token for result in free for token in result.token_ids[:8]}))
    params = SamplingSettings(30, temperature, banned_token_ids=banned)
    reference = plain(tiny_model)
    for prompt, result in zip(PROMPTS, generate(engine, PROMPTS, params, seeds=range(4)), strict=True):
        assert not set(result.token_ids) & set(banned)
        logits = reference(input_ids=torch.tensor([[*prompt, *result.token_ids]])).logits[0, len(prompt) - 1 : -1]
        kept = [v for v in range(logits.shape[1]) if v not in banned]
        logp = (logits[:, kept] / (temperature or 1.0)).log_softmax(-1)
        places = [kept.index(token) for token in result.token_ids]
        expected = logp.gather(1, torch.tensor(places)[:, None]).squeeze(1)
        assert close(result.logprobs, expected.tolist(), 1e-5)
        if temperature == 0:
            assert places == logp.argmax(-1).tolist()


def test_adapters_are_loaded_and_replaced(engine, adapters, tiny_model):
    params = SamplingSettings(12, 0.7, (EOS_ID,))
    bases = generate(engine, PROMPTS, params, seeds=range(4))
    assert {b.policy_version for b in bases} == {-1}
    for ref in adapters:
        engine.load_adapter(ref)
        assert engine.policy_version == ref.version
        reference = plain(tiny_model, ref)
        for prompt, base, result in zip(PROMPTS, bases, generate(engine, PROMPTS, params, seeds=range(4)), strict=True):
            assert result.policy_version == ref.version
            assert close(result.logprobs, plain_logprobs(reference, prompt, result.token_ids, 0.7), 1e-5)
            assert differ(base, result)


def test_only_the_current_adapter_is_kept(engine, adapters):
    for ref in adapters:
        engine.load_adapter(ref)
    assert list(engine._loaded().peft_config) == [adapters[-1].name]


def test_base_model_beside_the_adapter(engine, adapters):
    params = SamplingSettings(12, 0.7)
    base = generate(engine, PROMPTS, params, seeds=range(4))
    engine.load_adapter(adapters[0])
    adapted = generate(engine, PROMPTS, params, seeds=range(4))
    for _ in range(2):
        assert same(generate(engine, PROMPTS, params, seeds=range(4), adapter=None), base)
        assert same(generate(engine, PROMPTS, params, seeds=range(4)), adapted)
        assert same(generate(engine, PROMPTS, params, seeds=range(4), adapter=adapters[0]), adapted)
    assert all(differ(a, b) for a, b in zip(base, adapted, strict=True))
    assert engine.policy_version == 0


def test_base_and_adapter_in_flight_together(engine, adapters):
    params = SamplingSettings(12, 0.7)
    [base] = generate(engine, [PROMPTS[0]], params, seeds=[1])
    engine.load_adapter(adapters[0])
    [adapted] = generate(engine, [PROMPTS[0]], params, seeds=[1])

    async def both():
        return await asyncio.gather(
            *[engine.generate(PROMPTS[0], params, seed=1, adapter=a) for a in (None, adapters[0], None)],
            engine.generate(PROMPTS[0], params, seed=1),
        )

    assert same(engine.run(both()), [base, adapted, base, adapted])


def test_scoring_the_base_while_sampling_disturbs_neither(engine, adapters):
    engine.load_adapter(adapters[0])
    params = SamplingSettings(60, 0.7)
    expected = generate(engine, PROMPTS, params, seeds=range(4))
    wanted = engine.run(engine.score(PROMPTS[0], adapter=None))

    async def both():
        sampling = asyncio.gather(*[engine.generate(p, params, seed=i) for i, p in enumerate(PROMPTS)])
        scores = []
        while not sampling.done():
            scores.append(await engine.score(PROMPTS[0], adapter=None))
        return await sampling, scores

    results, scores = engine.run(both())
    assert all(s == pytest.approx(wanted, abs=1e-5) for s in scores)
    assert [r.token_ids for r in results] == [e.token_ids for e in expected]
    for result, one in zip(results, expected, strict=True):
        assert close(result.logprobs, one.logprobs, 1e-4)


def test_missing_adapter_is_named_and_changes_nothing(engine, adapters, tmp_path):
    engine.load_adapter(adapters[0])
    params = SamplingSettings(5)
    before = generate(engine, PROMPTS, params, seeds=range(4))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*no adapter_config.json"):
        engine.load_adapter(AdapterRef("nothing", 9, tmp_path, 9))
    assert engine.policy_version == 0
    assert same(generate(engine, PROMPTS, params, seeds=range(4)), before)


def damaged(adapter, tmp_path, change):
    import shutil

    from safetensors.torch import load_file, save_file

    path = tmp_path / "damaged"
    shutil.copytree(adapter.path, path)
    file = path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return AdapterRef("damaged", 99, path, 99)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_adapter_that_does_not_fit_is_refused(engine, adapters, tmp_path, damage):
    def change(state):
        name = sorted(state)[0]
        if damage == "missing":
            del state[name]
        else:
            state[name.replace("layers.0", "layers.7")] = state[name].clone()
        return state

    params = SamplingSettings(5)
    base = generate(engine, PROMPTS, params, seeds=range(4))
    with pytest.raises(RolloutError, match="adapter damaged does not fit"):
        engine.load_adapter(damaged(adapters[0], tmp_path, change))
    # It is not used afterwards, and a good one can follow.
    assert engine.policy_version == -1
    assert same(generate(engine, PROMPTS, params, seeds=range(4)), base)
    assert same(generate(engine, PROMPTS, params, seeds=range(4), adapter=None), base)
    engine.load_adapter(adapters[1])
    assert engine.policy_version == 1


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[2]])
def test_score_is_a_plain_forward(make_engine, model, prompt):
    engine = make_engine(model)
    scores = engine.run(engine.score(prompt))
    assert len(scores) == len(prompt) - 1
    assert close(scores, plain_logprobs(plain(model), prompt[:1], prompt[1:]), 1e-5)


def test_score_with_adapter_and_base(engine, adapters, tiny_model):
    ids = PROMPTS[0]
    base = plain_logprobs(plain(tiny_model), ids[:1], ids[1:])
    for ref in adapters[:2]:
        engine.load_adapter(ref)
        adapted = plain_logprobs(plain(tiny_model, ref), ids[:1], ids[1:])
        assert close(engine.run(engine.score(ids)), adapted, 1e-5)
        assert close(engine.run(engine.score(ids, adapter=None)), base, 1e-5)
        assert close(engine.run(engine.score(ids, adapter=ref)), adapted, 1e-5)


def test_score_of_what_was_generated(engine):
    [result] = generate(engine, [PROMPTS[0]], SamplingSettings(10, 1.0), seeds=[0])
    scores = engine.run(engine.score([*PROMPTS[0], *result.token_ids]))
    assert close(scores[-10:], result.logprobs, 1e-4)


def test_use_before_start_is_refused(adapters):
    engine = TransformersEngine()
    with pytest.raises(RolloutError, match="was not started"):
        engine.run(engine.generate(PROMPTS[0], SamplingSettings(1)))
    with pytest.raises(RolloutError, match="was not started"):
        engine.load_adapter(adapters[0])
    engine.close()


def test_use_after_close_is_refused(engine, adapters):
    engine.load_adapter(adapters[0])
    generate(engine, PROMPTS[:1], SamplingSettings(1))
    engine.close()
    engine.close()
    for coroutine in (engine.generate(PROMPTS[0], SamplingSettings(1)), engine.score(PROMPTS[0])):
        with pytest.raises(RolloutError, match="closed already"):
            engine.run(coroutine)
    with pytest.raises(RolloutError, match="closed already"):
        engine.load_adapter(adapters[1])
    assert engine.policy_version == -1


def test_start_is_idempotent_and_refuses_another_policy(engine, tiny_model, tiny_qwen3):
    loop = engine._loop
    engine.start(spec(tiny_model))
    assert engine._loop is loop
    with pytest.raises(ConfigurationError, match="close it before using it for"):
        engine.start(spec(tiny_qwen3))


def test_it_can_be_started_again_for_another_model(engine, adapters, tiny_qwen3):
    engine.load_adapter(adapters[0])
    first = generate(engine, PROMPTS, SamplingSettings(4), seeds=range(4))
    engine.close()
    engine.start(spec(tiny_qwen3))
    assert engine.policy_version == -1
    second = generate(engine, PROMPTS, SamplingSettings(4), seeds=range(4))
    assert {r.policy_version for r in second} == {-1}
    assert second != first


def test_close_while_sampling(engine):
    future = engine._loop.submit(engine.generate(PROMPTS[0], SamplingSettings(400)))
    engine.close()
    with pytest.raises(BaseException):  # noqa: B017, PT011
        future.result(timeout=10)


def test_cancelled_requests_are_not_sampled(make_engine, tiny_model):
    engine = make_engine(tiny_model, max_batch_size=1)
    generate(engine, PROMPTS[:1], SamplingSettings(1))
    sampled = []
    sample = engine._sample
    engine._sample = lambda batch: (sampled.extend(r.prompt_ids for r in batch), sample(batch))[1]

    async def cancel():
        requests = [asyncio.create_task(engine.generate(p, SamplingSettings(50), seed=0)) for p in PROMPTS]
        await asyncio.sleep(0.01)
        for request in requests[1:]:
            request.cancel()
        await requests[0]
        return await engine.generate(PROMPTS[0], SamplingSettings(3), seed=0)

    engine.run(cancel())
    assert sampled == [PROMPTS[0], PROMPTS[0]]


def test_a_batch_that_nobody_waits_for_ends(engine):
    """Its thread would keep the interpreter from exiting."""
    generate(engine, PROMPTS[:1], SamplingSettings(1))
    most, steps, begun = 2000, [], threading.Event()

    def count(*_):
        steps.append(1)
        begun.set()

    engine._model.register_forward_hook(count)
    future = engine._loop.submit(engine.generate(PROMPTS[0], SamplingSettings(most, stop_token_ids=()), seed=0))
    assert begun.wait(60)
    future.cancel()
    with engine._lock:
        assert len(steps) < most


def test_what_is_sampled_does_not_depend_on_the_default_dtype():
    """The Trainer's precision changes it for a while, and a rollout may be sampled beside."""
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))

    def picked():
        generators = [torch.Generator().manual_seed(row) for row in range(64)]
        return _pick(logits, SamplingSettings(1), generators)

    expected = picked()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = picked()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


def test_errors_reach_every_request_and_the_engine_goes_on(engine):
    sample = engine._sample

    def fail(batch):
        raise MemoryError("too large")

    engine._sample = fail

    async def ask():
        return await asyncio.gather(*[engine.generate(p, SamplingSettings(2)) for p in PROMPTS], return_exceptions=True)

    assert [str(e) for e in engine.run(ask())] == ["too large"] * 4
    engine._sample = sample
    assert len(generate(engine, PROMPTS, SamplingSettings(2))) == 4


def test_missing_model_is_an_error_at_first_use(make_engine, tmp_path):
    engine = make_engine(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="nowhere"):
        generate(engine, PROMPTS, SamplingSettings(1))


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_must_be_positive(size):
    with pytest.raises(ConfigurationError, match=f"max_batch_size >= 1, but got {size}"):
        TransformersEngine(max_batch_size=size)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype(make_engine, tiny_model, dtype, expected):
    engine = make_engine(tiny_model, dtype=dtype)
    [result] = generate(engine, [PROMPTS[0]], SamplingSettings(5, 0.7), seeds=[0])
    assert next(engine._loaded().parameters()).dtype == expected
    assert all(math.isfinite(v) and v <= 0 for v in result.logprobs)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 7), (0.8, 20), (0.01, 0)])
def test_truncated_sampling_draws_kept_tokens_alone_with_the_logprobs_of_what_is_left(engine, tiny_model, top_p, top_k):
    params = SamplingSettings(12, 0.7, top_p=top_p, top_k=top_k)
    prompts = PROMPTS * 8
    results = generate(engine, prompts, params, seeds=range(len(prompts)))
    reference, drawn = plain(tiny_model), set()
    for prompt, result in zip(prompts, results, strict=True):
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([[*prompt, *result.token_ids]])).logits[0, len(prompt) - 1 : -1]
        rows = (logits.double() / 0.7).softmax(-1).tolist()
        for place, (row, token, s) in enumerate(zip(rows, result.token_ids, result.logprobs, strict=True)):
            kept, mass = likeliest(row, top_p, top_k)
            assert token in kept
            assert s == pytest.approx(math.log(row[token] / mass), abs=1e-4)
            if place == 0 and prompt == prompts[0]:
                drawn.add(token)
    # What is kept is drawn from, not only its likeliest token; of less than any token's mass one is left.
    assert (len(drawn) > 1) == (top_p > 0.01)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 7)])
def test_the_logprobs_of_truncated_sampling_sum_to_one_over_what_is_kept(engine, top_p, top_k):
    """At one position, by the frequency and the logprob of every token that is drawn."""
    params = SamplingSettings(1, 1.0, top_p=top_p, top_k=top_k)
    results = generate(engine, PROMPTS[:1] * 4000, params, seeds=range(4000))
    said = {r.token_ids[0]: math.exp(r.logprobs[0]) for r in results}
    assert sum(said.values()) == pytest.approx(1, abs=1e-5)
    for token, probability in said.items():
        seen = sum(r.token_ids[0] == token for r in results) / len(results)
        assert seen == pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / len(results)))


def test_greedy_answers_are_not_truncated(engine):
    whole, cut = (
        generate(engine, PROMPTS, SamplingSettings(8, 0.0, top_p=top_p, top_k=top_k))
        for top_p, top_k in ((1.0, 0), (0.3, 2))
    )
    assert whole == cut

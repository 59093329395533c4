import asyncio

import pytest
import torch
from fakes import FakeEngine
from policies import batch, fit, logprobs, make_adapter, module, randomise, relaxed

from grpo_lightning import GRPOModule, TransformersEngine, VLLMEngine
from grpo_lightning.callbacks import AdapterExport, RatioDegeneracyDetector
from grpo_lightning.errors import ConfigurationError, RolloutError
from grpo_lightning.loading import load_policy
from grpo_lightning.rollout.engine import EngineSpec, FullWeightsEngine
from grpo_lightning.rollout.types import AdapterRef, SamplingSettings


@pytest.fixture(params=["tiny_model", "tiny_qwen3"], ids=["untied", "tied"])
def model(request):
    return request.getfixturevalue(request.param)


def full(model, **settings):
    return module(model, full_finetuning=True, **settings)


def load(model, **settings):
    return load_policy(model, full_finetuning=True, **{"dtype": "float32", **settings})


def started(model, dtype="float32"):
    engine = TransformersEngine(dtype=dtype)
    engine.start(EngineSpec(model, 0, 64, 4))
    return engine


class TestPolicy:
    def test_every_weight_is_trained_once(self, model):
        policy = load(model)
        names = set(policy.trainable_parameters())
        tied = policy.causal_lm.config.tie_word_embeddings
        assert names == {n for n in policy.causal_lm.state_dict() if not (tied and n == "lm_head.weight")}
        values, *_ = policy.token_logprobs(batch())
        grads = torch.autograd.grad(values.sum(), list(policy.trainable_parameters().values()))
        assert all(float(g.abs().max()) > 0 for g in grads)

    def test_it_starts_as_the_model(self, model):
        assert torch.equal(logprobs(load(model)), logprobs(load_policy(model, dtype="float32")))

    def test_the_reference_is_the_start(self, model):
        policy = load(model)
        start = logprobs(policy)
        randomise(policy)
        with policy.reference():
            assert torch.equal(policy.token_logprobs(batch())[0], start)
        assert (logprobs(policy) - start).abs().max() > 0.1

    @pytest.mark.parametrize(("kl_coef", "held"), [(0.0, False), (0.1, True)])
    def test_the_reference_is_held_only_if_it_is_used(self, tiny_model, kl_coef, held):
        trained = full(tiny_model, kl_coef=kl_coef)
        trained.configure_model()
        assert (trained.policy._start is not None) == held


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": "bfloat16"}, "got dtype='bfloat16'.*Use dtype='float32', with.*bf16-mixed"),
            ({"lora_rank": 4}, "no lora_. settings with full_finetuning"),
            ({"lora_targets": ["q_proj"]}, "no lora_. settings with full_finetuning"),
            ({"adapter": "somewhere"}, "expected adapter or full_finetuning, but got both; .*merge it first"),
        ],
    )
    def test_contradictions_are_refused_at_once(self, settings, message):
        with pytest.raises(ConfigurationError, match=message):
            GRPOModule("no-such-model", full_finetuning=True, **settings)

    def test_a_bfloat16_checkpoint_is_refused(self, tmp_path, tiny_model):
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match=r"got weights of torch.bfloat16 in .*Use dtype='float32'"):
            load(str(tmp_path), dtype="auto")
        assert {p.dtype for p in load(str(tmp_path)).trainable_parameters().values()} == {torch.float32}

    @pytest.mark.parametrize("engine", [FakeEngine, VLLMEngine])
    def test_engines_that_take_adapters_alone_are_refused_before_they_start(self, tmp_path, tiny_model, engine):
        engine = engine()
        with pytest.raises(
            ConfigurationError, match=rf"{type(engine).__name__} takes adapters alone; use Transformers"
        ):
            fit(tmp_path, full(tiny_model), engine)
        assert not getattr(engine, "specs", None)
        assert getattr(engine, "_spec", None) is None

    def test_a_precision_that_rounds_updates_away_is_refused(self, tmp_path, tiny_model):
        with pytest.raises(ConfigurationError, match=r"got Trainer\(precision='bf16-true'\).*bf16-mixed"):
            fit(tmp_path, full(tiny_model), TransformersEngine(), precision="bf16-true")

    def test_there_is_no_adapter_to_export(self, tmp_path, tiny_model):
        with pytest.raises(ConfigurationError, match="full_finetuning trains none; remove AdapterExport"):
            fit(tmp_path, full(tiny_model), TransformersEngine(), callbacks=[AdapterExport()])


class TestEngine:
    def score(self, engine, **settings):
        return engine.run(engine.score(list(range(3, 40)), **settings))

    def test_the_engine_serves_the_policy(self, model):
        policy = load(model, attn_implementation="sdpa")
        randomise(policy)
        engine = started(model)
        assert isinstance(engine, FullWeightsEngine)
        before = self.score(engine)
        assert engine.policy_version == -1
        engine.load_weights(policy.trainable_parameters(), 3)
        assert engine.policy_version == 3
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            expected = policy.causal_lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(self.score(engine)), expected, rtol=0, atol=1e-6)
        assert max(abs(a - b) for a, b in zip(before, self.score(engine), strict=True)) > 0.1
        generation = engine.run(engine.generate([3, 4, 5], SamplingSettings(4), seed=0))
        assert generation.policy_version == 3
        engine.close()
        assert engine.policy_version == -1

    def test_the_version_is_that_of_the_weights_that_sampled(self, tiny_model):
        """A request that waits while weights are loaded is sampled with the new ones."""
        engine = started(tiny_model)
        weights = load(tiny_model).trainable_parameters()
        engine.load_weights(weights, 0)

        async def late():
            request = asyncio.ensure_future(engine.generate([3, 4], SamplingSettings(2), seed=0))
            await asyncio.sleep(0)
            engine.load_weights(weights, 1)
            return await request

        assert engine.run(late()).policy_version == 1
        engine.close()

    def test_a_partial_load_is_refused_and_changes_nothing(self, model):
        policy, engine = load(model), started(model)
        before = self.score(engine)
        randomise(policy)
        whole = dict(policy.trainable_parameters())
        name = max(whole)
        for state in (
            {k: v for k, v in whole.items() if k != name},
            {**whole, "model.more.weight": whole[name]},
            {**whole, name: whole[name][..., :-1]},
        ):
            with pytest.raises(ConfigurationError, match=r"ForCausalLM with \d+ parameters, but 1 are missing, unkn"):
                engine.load_weights(state, 1)
        assert engine.policy_version == -1
        assert self.score(engine) == before
        engine.close()

    def test_base_and_adapters_are_gone(self, tmp_path, tiny_model):
        engine = started(tiny_model)
        engine.load_weights(load(tiny_model).trainable_parameters(), 0)
        with pytest.raises(RolloutError, match="base model was asked for, but the policy's weights have replaced it"):
            self.score(engine, adapter=None)
        folder = make_adapter(tiny_model, tmp_path / "a")
        with pytest.raises(RolloutError, match="an adapter needs the base model"):
            engine.load_adapter(AdapterRef("a", 1, folder, 1))
        engine.close()


class Detector(RatioDegeneracyDetector):
    """Keeps all its verdicts."""

    said = ()

    def _conclude(self, run, verdicts):
        self.said = (*self.said, *verdicts)
        super()._conclude(run, verdicts)


class TestTraining:
    def test_it_learns_from_its_own_samples(self, tmp_path, model):
        detector = Detector()
        trained = full(model, learning_rate=1e-3, kl_coef=0.1)
        start = {n: p.clone() for n, p in load(model).trainable_parameters().items()}
        run = fit(tmp_path, trained, TransformersEngine(dtype="float32"), epochs=3, callbacks=[detector])
        assert run.global_step == 3
        verdicts = {v.check: v for v in detector.said}
        assert verdicts["mismatch"].status.value == "pass"
        assert verdicts["served adapter"].status.value == "no power"
        assert verdicts["served adapter"].message.startswith("All weights are trained: there is no base model")
        assert float(run.callback_metrics["policy/kl_reference"]) > 0
        assert all(not torch.equal(p, start[n]) for n, p in trained.policy.trainable_parameters().items())

    def test_mixed_precision_keeps_float32_weights(self, tmp_path, tiny_model):
        trained = full(tiny_model)
        fit(tmp_path, trained, TransformersEngine(dtype="float32"), precision="bf16-mixed", callbacks=[relaxed()])
        assert {p.dtype for p in trained.policy.trainable_parameters().values()} == {torch.float32}

    def test_resuming(self, tmp_path, model):
        def run(folder, epochs, **settings):
            trained = full(model, kl_coef=0.1)
            fit(tmp_path / folder, trained, TransformersEngine(dtype="float32"), epochs=epochs, **settings)
            return trained.policy.trainable_parameters()

        whole = run("whole", 2)
        run("parts", 1)
        last = tmp_path / "parts" / "last.ckpt"
        state = torch.load(last, weights_only=True)["state_dict"]
        assert set(state) == {f"policy.model.{name}" for name in whole}
        resumed = run("parts", 2, ckpt_path=last)
        for name, parameter in whole.items():
            torch.testing.assert_close(parameter, resumed[name], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("first", ["full", "adapter"])
    def test_the_other_kind_of_checkpoint_is_refused(self, tmp_path, tiny_model, first):
        kinds = {"full": full(tiny_model), "adapter": module(tiny_model)}
        fit(tmp_path, kinds.pop(first), TransformersEngine(dtype="float32"))
        wanted = {"full": "expected full_finetuning=True, with which", "adapter": r"expected an adapter \(full_finetun"}
        with pytest.raises(ConfigurationError, match=wanted[first]):
            fit(tmp_path, *kinds.values(), TransformersEngine(dtype="float32"), ckpt_path=tmp_path / "last.ckpt")

    def test_an_incomplete_checkpoint_is_refused(self, tmp_path, tiny_model):
        fit(tmp_path, full(tiny_model), TransformersEngine(dtype="float32"))
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        checkpoint["state_dict"].pop("policy.model.model.norm.weight")
        torch.save(checkpoint, tmp_path / "cut.ckpt")
        with pytest.raises(ConfigurationError, match=r"1 parameters are missing \['policy.model.model.norm.weight'\]"):
            fit(tmp_path, full(tiny_model), TransformersEngine(dtype="float32"), ckpt_path=tmp_path / "cut.ckpt")

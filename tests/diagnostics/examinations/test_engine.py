"""Faults of what the engine serves, and healthy engines: a short run of a tiny model with the transformers engine."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from policies import make_adapter
from runs import data

from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.adapters import read_adapter_config, read_adapter_weights, save_adapter, write_adapter
from grpo_lightning.callbacks import LoRAWeightSync, RunDoctor
from grpo_lightning.diagnostics.verdict import Status
from grpo_lightning.errors import DegeneracyError, EngineDiedError, RolloutError
from grpo_lightning.rollout.engine import CURRENT
from grpo_lightning.rollout.types import AdapterRef


class Doctor(RunDoctor):
    """Keeps the engine's verdicts of every moment."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.moments = []

    def examine_engine(self, trainer):
        try:
            super().examine_engine(trainer)
        finally:
            self.moments.append(list(self.verdicts))


@pytest.fixture
def run(tmp_path, tiny_model):
    def start(*, engine=None, sync=None, doctor=None, epochs=3, callbacks=(), ckpt_path=None, module=None, **settings):
        doctor = doctor or Doctor()
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[doctor, sync or LoRAWeightSync(), *callbacks],
        )
        settings = {"max_tokens": 16, "max_prompt_tokens": 64, **settings}
        module = {"dtype": "float32", "lora_rank": 4, "learning_rate": 1e-3, **(module or {})}
        trainer.fit(
            GRPOModule(tiny_model, **module),
            data(engine or TransformersEngine(dtype="float32"), **settings),
            ckpt_path=ckpt_path,
        )
        return doctor

    return start


def failures(doctor):
    return [(v.check, v.cause) for moment in doctor.moments for v in moment if v.status is Status.FAIL]


def halted(start, **settings):
    doctor = Doctor()
    with pytest.raises(DegeneracyError) as error:
        start(doctor=doctor, **settings)
    root = next(v for v in doctor.moments[-1] if v.status is Status.FAIL and v.message in str(error.value))
    return len(doctor.moments), root, str(error.value)


class Served(TransformersEngine):
    """An engine that loads something else than what it is given."""

    def __init__(self, change):
        super().__init__(dtype="float32")
        self.change = change

    def load_adapter(self, ref):
        from safetensors.torch import load_file, save_file

        path = ref.path.with_name(ref.path.name + "-changed")
        path.mkdir()
        config = json.loads((ref.path / "adapter_config.json").read_text())
        weights, config = self.change(load_file(ref.path / "adapter_model.safetensors"), config)
        save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config))
        super().load_adapter(replace(ref, path=path))


class Mute(LoRAWeightSync):
    """Publishes the first time only, and says it did."""

    def publish(self, module, engine):
        if engine.policy_version < 0:
            super().publish(module, engine)
        else:
            engine._current = replace(engine._current, version=module.policy_version)


class Reused(TransformersEngine):
    """Takes what it is given for loaded as soon as it holds anything."""

    def load_adapter(self, ref):
        if self._current is None:
            super().load_adapter(ref)
        self._current = replace(self._current, version=ref.version)


class OneBehind(LoRAWeightSync):
    """Loads what was written the time before, under the new version."""

    def publish(self, module, engine):
        late = getattr(self, "_late", None)
        folder = self._root() / f"kept-{next(self._ids)}"
        save_adapter(module.policy, folder)
        self._late = AdapterRef(folder.name, next(self._ids), folder, module.policy_version)
        engine.load_adapter(replace(late or self._late, version=module.policy_version, name=f"x{next(self._ids)}"))


class Deaf(TransformersEngine):
    """Answers every request with the base model."""

    def _activate(self, ref):
        model = super()._activate(ref)
        if self._current is not None:
            model.disable_adapters()
        return model


class Merging(TransformersEngine):
    """Merges the adapter into its weights in bfloat16."""

    def _activate(self, ref):
        from peft.tuners.lora import LoraLayer

        model = self._loaded()
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        self.base = getattr(self, "base", {}) or {n: m.base_layer.weight.detach().clone() for n, m in layers}
        if self._current is not None:
            model.disable_adapters()
        for name, layer in layers:
            weight = self.base[name]
            if ref is not None:
                weight = (weight + layer.get_delta_weight(ref.name)).bfloat16().float()
            layer.base_layer.weight.data = weight
        return model


def without(*families):
    def change(weights, config):
        return {k: torch.zeros_like(w) if any(f in k for f in families) else w for k, w in weights.items()}, config

    return change


def rescaled(weights, config):
    return weights, {**config, "lora_alpha": config["lora_alpha"] / 2}


def in_bfloat16(weights, config):
    return {k: w.bfloat16().float() for k, w in weights.items()}, config


FAULTS = {
    "no-op": ({"sync": Mute}, "sync_noop"),
    "name taken for loaded": ({"engine": Reused}, "sync_noop"),
    "one behind": ({"sync": OneBehind}, "sync_stale"),
    "ignored": ({"engine": Deaf}, "adapter_ignored"),
    "one family missing": ({"engine": lambda: Served(without("v_proj"))}, "adapter_partial"),
    "two families missing": ({"engine": lambda: Served(without("o_proj", "up_proj"))}, "adapter_partial"),
    "one layer missing": ({"engine": lambda: Served(without("layers.1.self_attn.k_proj"))}, "adapter_partial"),
    "half the scale": ({"engine": lambda: Served(rescaled)}, "adapter_scale"),
    "rounded": ({"engine": lambda: Served(in_bfloat16)}, "adapter_rounded"),
    "merged": ({"engine": lambda: Merging(dtype="float32")}, "merged_rounding"),
}


class TestFaults:
    @pytest.mark.parametrize("start", ["fresh", "adapter"])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_named_before_anything_is_generated(self, run, fault, start, tiny_model, tmp_path):
        parts, cause = FAULTS[fault]
        module = {} if start == "fresh" else {"adapter": str(make_adapter(tiny_model, tmp_path / "a", lora_rank=4))}
        if start == "adapter":
            module["lora_rank"] = 16
        moments, root, text = halted(run, module=module, **{name: make() for name, make in parts.items()})
        assert (moments, root.cause) == (1, cause), text
        if "family" in fault:
            assert "v_proj" in root.message


class Writes(LoRAWeightSync):
    """Publishes other weights than the policy's.

    Args:
        change: From the policy's weights to those that are written.
        markers_only: Leave alone what the policy holds as a run begins.
    """

    def __init__(self, change, *, markers_only=False):
        super().__init__()
        self._change, self._markers_only = change, markers_only

    def publish(self, module, engine):
        held = {n: p.detach().clone() for n, p in module.policy.trainable_parameters().items()}
        right = self._markers_only and module.policy_version < 10**6
        with module.policy._holding(held if right else self._change(held)):
            super().publish(module, engine)


def one_late():
    """The weights of the time before."""
    kept = []

    def written(weights):
        kept.append(weights)
        return kept[max(0, len(kept) - 2)]

    return written


WRITTEN_WRONG = {
    "a family left out": (
        lambda held: {n: w * ("down_proj" not in n or "lora_A" in n) for n, w in held.items()},
        "adapter_changed",
        "such as base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
    ),
    "a buffer that is not swapped": (
        one_late(),
        "adapter_changed",
        "What was published is an earlier version of the adapter.",
    ),
    "rounded": (
        lambda held: in_bfloat16(held, {})[0],
        "adapter_rounded",
        "rounded to bfloat16 when it is published",
    ),
}


class TestWrittenWrong:
    @pytest.mark.parametrize("fault", WRITTEN_WRONG)
    def test_named_by_the_file_and_not_by_what_the_engine_makes_of_it(self, run, fault):
        change, cause, words = WRITTEN_WRONG[fault]
        moments, root, text = halted(run, sync=Writes(change, markers_only=True))
        assert (moments, root.check, root.cause) == (1, "published adapter", cause), text
        assert words in text
        assert "Explained by it" not in text

    def test_rounding_of_what_needs_more_than_the_policy_does_so_far(self, run, tiny_model, tmp_path):
        fine, folder = make_adapter(tiny_model, tmp_path / "fine", lora_rank=4), tmp_path / "coarse"
        write_adapter(*in_bfloat16(read_adapter_weights(fine), read_adapter_config(fine)), folder)
        sync = Writes(lambda held: in_bfloat16(held, {})[0])
        moments, root, text = halted(run, sync=sync, module={"adapter": str(folder), "lora_rank": 16})
        assert (moments, root.check, root.cause) == (1, "published adapter", "adapter_rounded"), text
        assert "Explained by it" not in text

    def test_named_although_the_engine_dies_of_it(self, run):
        class Dies(TransformersEngine):
            async def generate(self, *args, **settings):
                raise EngineDiedError("cannot read the adapter")

        def doubled(held):
            return {n: 2 * w for n, w in held.items()}

        moments, root, text = halted(run, engine=Dies(dtype="float32"), sync=Writes(doubled))
        assert (moments, root.cause) == (1, "adapter_changed"), text
        with pytest.raises(EngineDiedError, match="cannot read the adapter"):
            run(engine=Dies(dtype="float32"))


class Later(LoRAWeightSync):
    """Publishes as it should until a version, and from then on something else."""

    def __init__(self, version, otherwise):
        super().__init__()
        self._broken, self._otherwise = version, otherwise

    def publish(self, module, engine):
        if self._broken <= module.policy_version < 10**6:
            self._otherwise(self, module, engine)
        else:
            super().publish(module, engine)


def nothing(sync, module, engine):
    engine._current = replace(engine._current, version=module.policy_version)


def the_base(sync, module, engine):
    with module.policy._holding({n: torch.zeros_like(p) for n, p in module.policy.trainable_parameters().items()}):
        LoRAWeightSync.publish(sync, module, engine)


def rounding(sync, module, engine):
    held = {n: p.detach().bfloat16().float() for n, p in module.policy.trainable_parameters().items()}
    with module.policy._holding(held):
        LoRAWeightSync.publish(sync, module, engine)


class Merge(LoRAWeightSync):
    """Leaves the base model's weights as merging and unmerging does."""

    def publish(self, module, engine):
        super().publish(module, engine)
        if module.policy_version == 2:
            module.policy.model.merge_adapter()
            module.policy.model.unmerge_adapter()


class Cached(TransformersEngine):
    """Continues what it continued before as it did then, whatever the adapter."""

    def __init__(self):
        super().__init__(dtype="float32")
        self.cache = {}

    async def generate(self, prompt_ids, params, *, seed=None, cache_salt=None, **settings):
        key = (tuple(prompt_ids), cache_salt)
        if params.temperature == 0 and key in self.cache:
            return self.cache[key]
        self.cache[key] = await super().generate(prompt_ids, params, seed=seed, **settings)
        return self.cache[key]


class OtherBase(TransformersEngine):
    def _loaded(self):
        fresh = self._model is None
        model = super()._loaded()
        if fresh:
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.5)
        return model


class TestLaterFaults:
    @pytest.mark.parametrize(
        ("sync", "cause"),
        [
            (lambda: Later(2, nothing), "sync_noop"),
            (lambda: Later(2, the_base), "adapter_changed"),
            (lambda: Later(2, rounding), "adapter_rounded"),
            (Merge, "base_changed"),
        ],
        ids=["stops", "empty", "rounds", "merges"],
    )
    def test_named_at_the_next_publication(self, run, sync, cause):
        moments, root, text = halted(run, sync=sync(), epochs=5)
        assert (moments, root.cause) == (3, cause), text

    def test_one_behind_from_some_version_on(self, run):
        def late(sync, module, engine):
            held, sync.held = getattr(sync, "held", before), copy(module)
            with module.policy._holding(held):
                LoRAWeightSync.publish(sync, module, engine)

        def copy(module):
            return {n: p.detach().clone() for n, p in module.policy.trainable_parameters().items()}

        class Late(Later):
            def publish(self, module, engine):
                if module.policy_version == 2:
                    self.held = copy(module)
                super().publish(module, engine)

        before = None
        moments, root, text = halted(run, sync=Late(3, late), epochs=6)
        assert (moments, root.cause) == (4, "adapter_changed"), text
        assert "an earlier version of the adapter" in root.message


class TestOtherFaults:
    def test_prefix_cache(self, run):
        moments, root, text = halted(run, engine=Cached())
        assert (moments, root.cause) == (1, "prefix_cache_stale"), text

    def test_base_differs(self, run):
        moments, root, text = halted(run, engine=OtherBase(dtype="float32"))
        assert (moments, root.cause) == (1, "base_differs"), text

    def test_full_finetuning_partly_loaded(self, run):
        class Partly(TransformersEngine):
            def load_weights(self, state, version):
                own = dict(self._loaded().named_parameters())
                kept = {n: own[n].detach() if "v_proj" in n and version else w for n, w in state.items()}
                super().load_weights(kept, version)

        settings = {"full_finetuning": True, "learning_rate": 1e-4, "lora_rank": 16}
        moments, root, text = halted(run, engine=Partly(dtype="float32"), module=settings)
        assert (moments, root.cause) == (1, "adapter_partial"), text
        assert "v_proj" in root.message

    def test_an_engine_that_cannot_score(self, run):
        class Mute(TransformersEngine):
            async def score(self, token_ids, **settings):
                raise NotImplementedError

        doctor = run(engine=Mute(dtype="float32"))
        verdicts = [v for moment in doctor.moments for v in moment]
        assert [v.status for v in verdicts if v.check == "canary"] == [Status.NO_POWER] * 3
        assert [v.status for v in verdicts if v.check == "published adapter"] == [Status.PASS] * 3
        assert {"base agreement", "marker"}.isdisjoint(v.check for v in verdicts)

    def test_a_fault_inside_score_is_no_missing_method(self, run):
        class Broken(TransformersEngine):
            async def score(self, token_ids, **settings):
                return self.no_such_attribute

        with pytest.raises(AttributeError, match="no_such_attribute"):
            run(engine=Broken(dtype="float32"))

    def test_declared_precision_that_loses_the_updates(self, run, tiny_model, tmp_path):
        class Coarse(Served):
            lora_dtype = "bfloat16"

        adapter = str(make_adapter(tiny_model, tmp_path / "a", lora_rank=4))
        module = {"adapter": adapter, "lora_rank": 16, "learning_rate": 1e-5}
        with pytest.warns(UserWarning, match="was told to keep the adapter in bfloat16"):
            doctor = run(engine=Coarse(in_bfloat16), module=module)
        assert {v.cause for moment in doctor.moments for v in moment} == {"", "adapter_resolution"}
        assert failures(run(engine=Coarse(in_bfloat16), epochs=2, module={"learning_rate": 1e-3})) == []

    def test_an_engine_that_dies_of_the_questions_is_still_named(self, run):
        """vLLM dies when it must load again what a publication has deleted meanwhile."""

        class Dying(Reused):
            async def score(self, token_ids, *, adapter=CURRENT):
                if adapter is not CURRENT and adapter is not None:
                    self.dead = True
                if getattr(self, "dead", False):
                    raise EngineDiedError("no adapter found")
                return await super().score(token_ids, adapter=adapter)

            async def generate(self, prompt_ids, params, **settings):
                if getattr(self, "dead", False):
                    raise EngineDiedError("no adapter found")
                return await super().generate(prompt_ids, params, **settings)

        moments, root, text = halted(run, engine=Dying(dtype="float32"))
        assert (moments, root.cause) == (1, "sync_noop"), text

    def test_the_engine_serves_the_policy_again_after_an_error(self, run):
        class Breaks(TransformersEngine):
            loads = 0

            def load_adapter(self, ref):
                super().load_adapter(ref)
                self.loads += 1
                self.served = ref.version
                if self.loads == 3:
                    raise RolloutError("broken")

        engine = Breaks(dtype="float32")
        with pytest.raises(RolloutError, match="broken"):
            run(engine=engine)
        assert (engine.loads, engine.served) == (4, 0)


class TestHealthy:
    def check(self, doctor):
        assert failures(doctor) == []
        return {v.check: v.status for v in doctor.moments[0]}

    def test_float32(self, run):
        doctor = run(epochs=4, updates_per_rollout=2)
        first = self.check(doctor)
        for name in ("base agreement", "marker", "adapter precision", "prefix cache", "published adapter", "canary"):
            assert first[name] is (Status.NO_POWER if name == "canary" else Status.PASS), name
        assert {v.check: v.status for v in doctor.moments[1]}["canary"] is Status.PASS

    def test_bfloat16(self, run):
        # This engine computes the very same as the trainer, until there is an adapter.
        doctor = Doctor(bitwise_consistent_engine=True, reactions={"other_weights": "log"})
        run(doctor=doctor, epochs=4, engine=TransformersEngine(dtype="bfloat16"), module={"dtype": "bfloat16"})
        assert self.check(doctor)["marker"] is Status.PASS

    def test_engine_in_another_precision(self, run):
        doctor = run(epochs=4, engine=TransformersEngine(dtype="bfloat16"))
        assert self.check(doctor)["marker"] is Status.PASS

    def test_trained_adapter(self, run, tiny_model, tmp_path):
        adapter = make_adapter(tiny_model, tmp_path / "a", lora_rank=4)
        doctor = run(module={"adapter": str(adapter), "lora_rank": 16})
        assert self.check(doctor)["canary"] is Status.PASS

    def test_full_finetuning(self, run):
        settings = {"full_finetuning": True, "dtype": "float32", "learning_rate": 1e-4, "lora_rank": 16}
        doctor = run(module=settings)
        assert self.check(doctor)["marker"] is Status.PASS

    def test_declared_lag(self, run):
        doctor = run(sync=LoRAWeightSync(max_lag=2), epochs=7)
        self.check(doctor)
        # Versions 0 to 6 are sampled from; every third is published.
        assert [c["version"] for c in doctor._engine.facts()["canary"]] == [0, 3, 6]

    def test_learning_rate_zero(self, run):
        doctor = run(module={"warmup_updates": 50, "learning_rate": 1e-6})
        self.check(doctor)

    def test_dropout(self, run):
        self.check(
            run(
                module={"lora_dropout": 0.2},
                doctor=Doctor(reactions={"mismatch": "log", "other_weights": "log", "ratio": "log"}),
            )
        )

    def test_resumed(self, run, tmp_path):
        keep = ModelCheckpoint(tmp_path, save_last=True)
        self.check(run(epochs=2, callbacks=[keep]))
        doctor = run(epochs=4, ckpt_path=tmp_path / "last.ckpt")
        assert self.check(doctor)["canary"] is Status.PASS

    def test_facts_and_metrics(self, run):
        doctor = run()
        facts = json.loads(json.dumps(doctor._engine.facts()))
        assert 0 < facts["noise_floor"] < 1e-5
        assert {m["family"] for m in facts["markers"]} == {
            f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")
        }
        assert all(abs(m["slope"] - 1) < 1e-3 for m in facts["markers"])
        assert [c["version"] for c in facts["canary"]] == [0, 1, 2]
        assert abs(facts["canary"][2]["alpha"] - 1) < 1e-3


@pytest.mark.parametrize("rounded_first", [False, True])
def test_an_adapter_merged_in_bfloat16(run, tiny_model, rounded_first):
    class Merging(TransformersEngine):
        """Serves adapters by adding them to its weights."""

        def _loaded(self):
            fresh = self._model is None
            model = super()._loaded()
            if fresh:
                self._pristine = {name: w.detach().clone() for name, w in model.state_dict().items()}
            return model

        def load_adapter(self, ref):
            self._loaded()
            self._current = ref

        def _activate(self, ref):
            model = self._loaded()
            model.load_state_dict(self._pristine)
            weights = {} if ref is None else read_adapter_weights(ref.path)
            parameters = dict(model.named_parameters())
            for name, a in weights.items():
                if ".lora_A" in name:
                    delta = 8.0 * weights[name.replace("lora_A", "lora_B")] @ a
                    target = parameters[name.removeprefix("base_model.model.").replace("lora_A.", "")]
                    early = torch.bfloat16 if rounded_first else torch.float32
                    target.data = (target.data.to(early) + delta.to(early)).bfloat16().float()
            return model

    _, root, _ = halted(run, engine=Merging(dtype="float32"))
    assert root.cause == "merged_rounding"


def test_a_trainers_adapter_in_bfloat16_is_the_trainers_precision(run, monkeypatch):
    configure = GRPOModule.configure_model

    def converted(self):
        fresh = not hasattr(self, "policy")
        configure(self)
        for parameter in self.policy.trainable_parameters().values() if fresh else ():
            parameter.data = parameter.data.bfloat16()

    monkeypatch.setattr(GRPOModule, "configure_model", converted)
    assert failures(run(epochs=1)) == []

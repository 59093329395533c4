"""Every variant of the algorithm in a short real run under the doctor, and the doctor's eyes on the variants."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import seed_everything
from runs import MODEL, RecordingEngine, data, trainer

import grpo_lightning.module
from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.callbacks import RunDoctor
from grpo_lightning.diagnostics.verdict import Status
from grpo_lightning.errors import DegeneracyError
from grpo_lightning.functional.surrogates import SURROGATES
from grpo_lightning.objective import policy_loss
from grpo_lightning.rollout.advantages import Advantages


class Doctor(RunDoctor):
    """The whole doctor, with every verdict of the run."""

    def __init__(self, **settings):
        super().__init__(report=False, **{"ascent_every": 4, **settings})
        self.all = []

    def _conclude(self, run, verdicts):
        self.all += verdicts
        super()._conclude(run, verdicts)

    def statuses(self, check):
        return {verdict.status for verdict in self.all if verdict.check == check}

    def causes(self):
        return {verdict.cause for verdict in self.all if verdict.status is Status.FAIL}


class QuietDoctor(Doctor):
    """With its founding checks alone, which ask the engine for nothing."""

    def _further_parts(self):
        return ()


def distinct(completion):
    return float(len(set(completion)))


def of_three(completion):
    return float(ord(completion[:1] or "a") % 3)


def halved(terms, *, share=0.5):
    """A surrogate of one's own."""
    own = SURROGATES["clipped"](terms)
    return replace(own, loss=share * own.loss)


def fit(tmp_path, model, module=None, samples=None, *, doctor=None, engine=None, run=None):
    seed_everything(1, verbose=False)
    doctor = doctor or Doctor()
    fitting = trainer(tmp_path, callbacks=[doctor], **{"max_epochs": 3, **(run or {})})
    policy = GRPOModule(model, **{**MODEL, **(module or {})})
    samples = {"reward": distinct, "inner_epochs": 2, **(samples or {})}
    rollouts = data(engine or TransformersEngine(dtype="float32"), **samples)
    fitting.fit(policy, datamodule=rollouts)
    return doctor, fitting, rollouts


def module(**settings):
    return {"module": settings}


VARIANTS = {
    "grpo": {},
    "dapo": module(aggregation="token", clip_high=0.28),
    "dr_grpo": {**module(aggregation="constant"), "samples": {"advantage": "group_mean"}},
    "dr_grpo, length given": module(aggregation="constant", aggregation_length=100),
    "sum": {**module(aggregation="sequence_sum"), "samples": {"advantage": "batch_std"}},
    "gspo": module(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4),
    "gspo_token": module(ratio_level="sequence_token"),
    "product": module(ratio_level="sequence_product"),
    "gspo, tokens": module(ratio_level="sequence", aggregation="token"),
    "cispo": module(surrogate="cispo"),
    "cispo, both clips": module(surrogate="cispo", clip_low=0.5, clip_high=1.0),
    "sapo": module(surrogate="sapo"),
    "sapo of sequences": module(surrogate="sapo", ratio_level="sequence"),
    "reinforce": {**module(surrogate="reinforce"), "samples": {"advantage": "leave_one_out"}},
    "clip_cov": module(surrogate="clip_cov", surrogate_args={"share": 0.1, "low": -1, "high": 5}),
    "kl_cov": module(surrogate="kl_cov", surrogate_args={"share": 0.1}),
    "dppo_tv": module(surrogate="dppo"),
    "dppo_kl": module(surrogate="dppo", surrogate_args={"divergence": "kl", "threshold": 0.05}),
    "gmpo": module(surrogate="gmpo"),
    "dual clip": module(surrogate_args={"dual_clip": 3.0}),
    "delta": module(surrogate_args={"delta": 4.0}),
    "own": module(surrogate=halved, surrogate_args={"share": 0.25}),
    "k2": module(kl_coef=0.1, kl_estimator="k2"),
    "abs": module(kl_coef=0.1, kl_estimator="abs"),
    "k1 in the reward": module(kl_coef=0.1, kl_estimator="k1", kl_in="reward"),
    "k3 in the reward": module(kl_coef=0.1, kl_in="reward"),
    "adaptive kl": module(kl_coef=0.1, kl_target=0.01),
    "entropy": module(entropy_coef=0.01),
    "entropy target": module(entropy_target=5.0, entropy_step=0.01),
    "entropy share": module(entropy_share=0.2),
    "gspo of an entropy share": module(entropy_share=0.3, ratio_level="sequence"),
    "trainer": module(old_logprobs="trainer"),
    "tis_token": module(correction="tis_token"),
    "tis_sequence": module(correction="tis_sequence"),
    "mis_token": module(correction="mis_token"),
    "mis_sequence": module(correction="mis_sequence", correction_args={"low": 0.9, "high": 1.1}),
    "geometric_mask": module(correction="geometric_mask", correction_args={"low": 0.99, "high": 1.01}),
    "reject_k1": module(correction="reject_k1", correction_args={"threshold": 0.01}),
    "reject_k3": module(correction="reject_k3", correction_args={"threshold": 0.01}),
    "max_kl": {**module(max_kl=1e-3, learning_rate=1e-2), "samples": {"inner_epochs": 4}},
    "masked, overlong": {"samples": {"mask_truncated": True, "overlong_buffer": 4, "max_tokens": 40}},
    "refills": {"samples": {"max_refills": 2}},
    "accumulation": {**module(surrogate="sapo", kl_coef=0.1, kl_estimator="k2"), "run": {"accumulate_grad_batches": 3}},
    "all at once": {
        **module(
            surrogate="kl_cov", surrogate_args={"share": 0.05}, kl_coef=0.05, kl_estimator="k2", entropy_coef=0.01,
            correction="tis_token", entropy_share=0.5, aggregation="token", ratio_level="sequence_token",
        ),
        "samples": {"advantage": "leave_one_out", "max_refills": 1},
        "run": {"accumulate_grad_batches": 2},
    },
    **{
        name: {"samples": {"advantage": name}}
        for name in ("reinforce_pp", "reinforce_pp_baseline", "remax", "opo", "maxrl", "gdpo", "leave_one_out")
    },
    "pass_at_k": {
        "samples": {"advantage": "pass_at_k", "advantage_args": {"k": 2, "success_reward": 2.0}, "reward": of_three}
    },
    "trainer, one update": {**module(old_logprobs="trainer"), "samples": {"inner_epochs": 1}},
    "correction, one update": {**module(correction="mis_token"), "samples": {"inner_epochs": 1}},
    "trainer with dropout": module(old_logprobs="trainer", lora_dropout=0.1),
}  # fmt: skip


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_the_doctor_passes_every_variant(tmp_path, tiny_model, settings):
    doctor, fitting, _ = fit(tmp_path, tiny_model, **settings)
    assert doctor.causes() == set()
    assert Status.PASS in doctor.statuses("gradient")
    assert Status.PASS in doctor.statuses("ascent")
    assert Status.PASS in doctor.statuses("advantages")
    assert doctor.statuses("loss weights") == {Status.PASS}
    assert fitting.global_step >= 3


@pytest.mark.parametrize("surrogate", ["clipped", "sapo", "cispo", "dppo", "reinforce"])
def test_equal_rewards_leave_no_gradient_to_judge(tmp_path, tiny_model, surrogate):
    doctor, _, _ = fit(tmp_path, tiny_model, {"surrogate": surrogate}, {"reward": lambda completion: 1.0})
    assert doctor.statuses("gradient") == {Status.NO_POWER}


class TestDynamicSampling:
    def flat_for_some(self, completion, task_id):
        return 1.0 if int(task_id.split("+")[0]) < 2 else float(len(set(completion)))

    def test_groups_without_variance_are_replaced(self, tmp_path, tiny_model):
        seen = []

        class Watch(QuietDoctor):
            def on_train_epoch_end(self, trainer, pl_module):
                super().on_train_epoch_end(trainer, pl_module)
                seen.append((trainer.datamodule.rollout, trainer.datamodule.state_dict()["tasks_drawn"]))

        engine = RecordingEngine()
        samples = {"reward": self.flat_for_some, "max_refills": 6, "prompts_per_rollout": 5, "samples_per_prompt": 4}
        doctor, _, rollouts = fit(tmp_path, tiny_model, None, samples, doctor=Watch(), engine=engine)
        assert doctor.causes() == set()
        drawn = 0
        for rollout, tasks_drawn in seen:
            assert len(rollout.groups) == len(rollout.origin.tasks) == 5
            for group, index in zip(rollout.groups, rollout.origin.tasks, strict=True):
                assert group.task == rollouts.tasks[index]
                assert len({episode.reward for episode in group.episodes}) > 1
            assert rollout.origin.metrics["group/replaced"] == rollout.origin.drawn - 5
            drawn += rollout.origin.drawn
            assert tasks_drawn == drawn
        assert drawn > 15, "some groups were replaced"
        assert len(engine.seeds) == 4 * drawn
        assert len(set(engine.seeds)) == len(engine.seeds)

    def test_rounds_are_bounded(self, tmp_path, tiny_model):
        engine = RecordingEngine()
        samples = {"reward": lambda completion: 1.0, "max_refills": 2}
        settings = {"engine": engine, "doctor": QuietDoctor(), "run": {"max_epochs": 1}}
        _, _, rollouts = fit(tmp_path, tiny_model, None, samples, **settings)
        assert len(engine.seeds) == 3 * 4 * 3
        assert len(rollouts.rollout.groups) == 4
        assert rollouts.rollout.origin.drawn == 12
        assert rollouts.state_dict()["tasks_drawn"] == 12


class TestReMax:
    def test_the_greedy_answer_is_asked_for_and_compared_with(self, tmp_path, tiny_model):
        greedy = []

        class Counting(TransformersEngine):
            async def generate(self, prompt_ids, params, **settings):
                generation = await super().generate(prompt_ids, params, **settings)
                if params.temperature == 0:
                    greedy.append((tuple(prompt_ids), generation.token_ids))
                return generation

        _, _, rollouts = fit(
            tmp_path, tiny_model, None, {"advantage": "remax"},
            engine=Counting(dtype="float32"), run={"max_epochs": 1},
        )  # fmt: skip
        groups = rollouts.rollout.groups
        answers = dict(greedy)
        assert len(greedy) >= 4
        for group in groups:
            text = rollouts.sampler.encoder.decode(answers[group.prompt_ids])
            assert group.greedy == distinct(text)
            for episode, (advantage,) in zip(group.episodes, group.advantages, strict=True):
                assert advantage == pytest.approx(episode.reward - group.greedy)

    def test_other_estimators_do_not_ask(self, tmp_path, tiny_model):
        engine = RecordingEngine()
        _, _, rollouts = fit(tmp_path, tiny_model, None, {"advantage": "opo"}, engine=engine, run={"max_epochs": 1})
        assert {group.greedy for group in rollouts.rollout.groups} == {None}


def recomputed(objective, inputs):
    """The founding defect: the old logprobs are those of the current policy."""
    return policy_loss(objective, replace(inputs, old_logprobs=inputs.logprobs.detach()))


class TestFaultsOfVariants:
    def halts(self, tmp_path, model, cause, *words, **settings):
        doctor = Doctor()
        with pytest.raises(DegeneracyError) as error:
            fit(tmp_path, model, doctor=doctor, **settings)
        assert cause in doctor.causes(), f"{doctor.causes()}: {error.value}"
        for word in words:
            assert word in str(error.value)

    @pytest.mark.parametrize(
        "settings",
        [
            {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
            {"surrogate": "cispo"},
            {"surrogate": "dppo"},
            {"surrogate": "kl_cov", "surrogate_args": {"share": 0.1}},
            {"old_logprobs": "trainer"},
            {"correction": "tis_token"},
            {"entropy_share": 0.5},
        ],
        ids=str,
    )
    def test_old_logprobs_recomputed(self, tmp_path, tiny_model, monkeypatch, settings):
        monkeypatch.setattr(grpo_lightning.module, "policy_loss", recomputed)
        self.halts(tmp_path, tiny_model, "old_recomputed", module=settings)

    @pytest.mark.parametrize(
        "settings", [{"ratio_level": "sequence"}, {"surrogate": "sapo"}, {"correction": "mis_token"}], ids=str
    )
    @pytest.mark.parametrize(("factor", "cause"), [(-1, "wrong_sign"), (0.37, "wrong_scale")])
    def test_sign_and_scale(self, tmp_path, tiny_model, monkeypatch, settings, factor, cause):
        def wrong(objective, inputs):
            right = policy_loss(objective, inputs)
            return replace(right, loss=factor * right.loss)

        monkeypatch.setattr(grpo_lightning.module, "policy_loss", wrong)
        self.halts(tmp_path, tiny_model, cause, module=settings)

    def test_another_surrogate_than_declared(self, tmp_path, tiny_model, monkeypatch):
        def token_level(objective, inputs):
            return policy_loss(replace(objective, ratio_level="token"), inputs)

        monkeypatch.setattr(grpo_lightning.module, "policy_loss", token_level)
        settings = {"ratio_level": "sequence", "learning_rate": 1e-2, "clip_low": 0.5, "clip_high": 0.5}
        self.halts(tmp_path, tiny_model, "wrong_gradient", module=settings)

    @pytest.mark.parametrize("estimator", ["leave_one_out", "opo", "batch_std", "remax"])
    @pytest.mark.parametrize(
        ("change", "cause"),
        [
            (lambda advantages: -advantages, "advantages_sign"),
            (lambda advantages: advantages * 0, "advantages_zero"),
            (lambda advantages: advantages * 1.5, "advantages_wrong"),
        ],
    )
    def test_wrong_advantages(self, tmp_path, tiny_model, monkeypatch, estimator, change, cause):
        import grpo_lightning.sampling as at

        right = at.with_advantages

        def wrong(groups, *args, **settings):
            return [
                replace(g, advantages=tuple(tuple(change(torch.tensor(a)).tolist()) for a in g.advantages))
                for g in right(groups, *args, **settings)
            ]

        monkeypatch.setattr(at, "with_advantages", wrong)
        self.halts(tmp_path, tiny_model, cause, samples={"advantage": estimator})


def test_names_of_advantages():
    assert Advantages.from_settings("group_std", {}, "episode").plain
    assert not Advantages.from_settings("opo", {}, "episode").plain


@pytest.mark.parametrize(("level", "far"), [("token", True), ("sequence", False)])
def test_narrow_clips_of_whole_sequences_are_no_collapse(tmp_path, tiny_model, level, far):
    settings = {"ratio_level": level, "clip_low": 1e-7, "clip_high": 1e-7, "learning_rate": 1e-4}
    doctor, *_ = fit(tmp_path, tiny_model, settings, {"inner_epochs": 6})
    assert ("policy_collapsed" in doctor.causes()) == far

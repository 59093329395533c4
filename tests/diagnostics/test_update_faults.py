"""Faults of the update put into short real runs, and healthy runs that look like them."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from runs import MODEL, data, trainer
from torch.optim import SGD, AdamW

import grpo_lightning.module
from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.callbacks import ParameterPerturbation, RunDoctor
from grpo_lightning.diagnostics.checks.step import StepSize
from grpo_lightning.diagnostics.examinations.gradient import GradientExamination
from grpo_lightning.diagnostics.examinations.step import StepExamination
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status
from grpo_lightning.errors import DegeneracyError
from grpo_lightning.objective import policy_loss
from grpo_lightning.policy import Policy


class Doctor(RunDoctor):
    """With every verdict of the run, and with the parts alone that look at gradient and step."""

    def __init__(self, **settings):
        log = dict.fromkeys(("mismatch", "ratio"), "log")
        super().__init__(report=False, **{"reactions": log, "ascent_every": 4, **settings})
        self.all = []

    def _further_parts(self):
        return (GradientExamination(), StepExamination(self._ascent_every))

    def _conclude(self, run, verdicts):
        self.all += [(run.trainer.global_step, verdict) for verdict in verdicts]
        super()._conclude(run, verdicts)

    def causes(self):
        return {verdict.cause for _, verdict in self.all if verdict.cause}

    def messages(self, cause):
        return [str(verdict) for _, verdict in self.all if verdict.cause == cause]


def distinct(completion):
    return float(len(set(completion)))


def fit(tmp_path, model, *, doctor=None, module=None, run=None, samples=None, callbacks=(), kind=GRPOModule):
    """Train and return the doctor; what it finds is raised."""
    seed_everything(1, verbose=False)
    doctor = doctor or Doctor()
    fitting = trainer(tmp_path, callbacks=[*callbacks, doctor], **{"max_epochs": 2, **(run or {})})
    fitting.callbacks = [c for c in fitting.callbacks if c is doctor or not isinstance(c, RunDoctor)]
    samples = {"reward": distinct, "updates_per_rollout": 2, **(samples or {})}
    fitting.fit(kind(model, **{**MODEL, **(module or {})}), data(TransformersEngine(dtype="float32"), **samples))
    doctor.steps = fitting.global_step
    return doctor


def found(tmp_path, model, cause, *words, by=1, **settings):
    """The run halts for this cause, with these words, before more than ``by`` updates were applied."""
    doctor = settings.pop("doctor", None) or Doctor()
    with pytest.raises(DegeneracyError) as error:
        fit(tmp_path, model, doctor=doctor, **settings)
    root = next(line for line in str(error.value).splitlines())
    matching = [text for text in doctor.messages(cause) if text.splitlines()[0] == root]
    assert matching, f"{doctor.causes()}: {error.value}"
    for word in words:
        assert word in str(error.value), str(error.value)
    assert doctor.all[-1][0] <= by
    assert "Fix: " in str(error.value)


def replaced_loss(monkeypatch, make):
    monkeypatch.setattr(grpo_lightning.module, "policy_loss", make(policy_loss))


def scaled(factor):
    def make(right):
        def wrong(objective, inputs):
            loss = right(objective, inputs)
            return replace(loss, loss=factor * loss.loss)

        return wrong

    return make


class Held:
    """A forward pass that goes on using the adapter as it was at first."""

    def __init__(self, monkeypatch, noise=0.0):
        self.weights, self.noise = {}, noise
        right = Policy.token_logprobs

        def wrong(policy, batch, **options):
            if not self.weights:
                self.weights = {n: p.detach().clone() for n, p in policy.trainable_parameters().items()}
            with policy._holding(self.weights):
                return right(policy, batch, **options)

        monkeypatch.setattr(Policy, "token_logprobs", wrong)


@pytest.fixture
def begun(tmp_path_factory, tiny_model):
    """An adapter that was trained already: its B is not 0."""
    from grpo_lightning.adapters import save_adapter
    from grpo_lightning.loading import load_policy

    policy = load_policy(tiny_model, dtype="float32", lora_rank=4)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("adapters") / "begun"
    save_adapter(policy, folder)
    return str(folder)


class TestGradientAtTheLogprobs:
    def test_wrong_sign(self, tmp_path, tiny_model, monkeypatch):
        replaced_loss(monkeypatch, scaled(-1))
        found(tmp_path, tiny_model, "wrong_sign", "points the wrong way", by=0)

    def test_wrong_scale(self, tmp_path, tiny_model, monkeypatch):
        replaced_loss(monkeypatch, scaled(0.37))
        found(tmp_path, tiny_model, "wrong_scale", "is 0.37 times what it should be", by=0)

    def test_division_by_the_micro_batches_is_not_made_up_for(self, tmp_path, tiny_model, monkeypatch):
        step = GRPOModule.training_step
        monkeypatch.setattr(GRPOModule, "training_step", lambda self, batch, index: step(self, batch, index) / 3)
        run = {"accumulate_grad_batches": 3}
        found(tmp_path, tiny_model, "wrong_scale", "number of micro-batches of an update", by=0, run=run)

    def test_each_micro_batch_averaged_by_itself(self, tmp_path, tiny_model, monkeypatch):
        replaced_loss(
            monkeypatch,
            lambda loss: (
                lambda objective, inputs: loss(objective, replace(inputs, weight=inputs.weight / inputs.weight.sum()))
            ),
        )
        run = {"accumulate_grad_batches": 2}
        samples = {"updates_per_rollout": 1, "prompts_per_rollout": 3}
        found(tmp_path, tiny_model, "wrong_count", "micro-batch", by=0, run=run, samples=samples)

    def test_old_logprobs_attached(self, tmp_path, tiny_model, monkeypatch):
        def attached(objective, inputs):
            new, old = inputs.logprobs, inputs.old_logprobs
            loss = -(inputs.weight * inputs.advantages * (new - (old + new - new.detach())).exp()).sum()
            return replace(policy_loss(objective, inputs), loss=loss)

        monkeypatch.setattr(grpo_lightning.module, "policy_loss", attached)
        found(tmp_path, tiny_model, "old_attached", "cancels", by=0)

    def test_clipping_left_out(self, tmp_path, tiny_model, monkeypatch):
        replaced_loss(
            monkeypatch,
            lambda loss: (
                lambda objective, inputs: replace(
                    loss(objective, inputs),
                    loss=-(inputs.weight * inputs.advantages * (inputs.logprobs - inputs.old_logprobs).exp()).sum(),
                )
            ),
        )
        settings = {"module": {"learning_rate": 2e-2}, "samples": {"inner_epochs": 3}}
        found(tmp_path, tiny_model, "wrong_gradient", "clipping is left out", by=5, **settings)

    def test_kl_subtracted(self, tmp_path, tiny_model, monkeypatch):
        right = grpo_lightning.objective.kl_of
        monkeypatch.setattr(grpo_lightning.objective, "kl_of", lambda *given: -right(*given))
        found(tmp_path, tiny_model, "wrong_gradient", "KL term enters the gradient -1 times", module={"kl_coef": 0.2})

    def test_no_gradient(self, tmp_path, tiny_model, monkeypatch):
        replaced_loss(
            monkeypatch,
            lambda loss: (
                lambda objective, inputs: replace(
                    loss(objective, inputs), loss=inputs.logprobs.detach().requires_grad_().sum() * 0.1
                )
            ),
        )
        found(tmp_path, tiny_model, "wrong_gradient", "No gradient reached the current logprobs", by=0)


class TestWeights:
    def test_divided_by_the_longest(self, tmp_path, tiny_model, monkeypatch):
        monkeypatch.setattr(GRPOModule, "token_weights", lambda self, lengths: [1 / (len(lengths) * 7)] * len(lengths))
        found(tmp_path, tiny_model, "wrong_count", "sum of the weights", by=0)

    def test_other_aggregation(self, tmp_path, tiny_model, monkeypatch):
        monkeypatch.setattr(GRPOModule, "token_weights", lambda self, lengths: [1 / sum(lengths)] * len(lengths))
        samples = {"updates_per_rollout": 1, "prompts_per_rollout": 12}
        found(tmp_path, tiny_model, "wrong_count", "aggregation='token'", by=0, samples=samples)

    def test_all_masked(self, tmp_path, tiny_model, monkeypatch):
        monkeypatch.setattr(GRPOModule, "token_weights", lambda self, lengths: [0.0] * len(lengths))
        found(tmp_path, tiny_model, "all_masked", "No token of this update has a weight", by=0)


class OldWithGradient(Callback):
    """Old logprobs from a second forward with gradients: every parameter's gradient cancels."""

    def __init__(self, monkeypatch):
        self.old = None
        right = Policy.token_logprobs

        def twice(policy, batch, **options):
            self.old = right(policy, batch, **options).logprobs if torch.is_grad_enabled() else None
            return right(policy, batch, **options)

        def attached(objective, inputs):
            new = inputs.logprobs
            again = new if self.old is None else self.old
            ratio = (new - again + new.detach() - inputs.old_logprobs).exp()
            loss = -(inputs.weight * inputs.advantages * ratio).sum()
            return replace(policy_loss(objective, inputs), loss=loss)

        monkeypatch.setattr(Policy, "token_logprobs", twice)
        monkeypatch.setattr(grpo_lightning.module, "policy_loss", attached)


class ClearsGradient(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        optimizer.zero_grad()


class TestGradientAtTheParameters:
    def test_old_logprobs_of_a_second_forward(self, tmp_path, tiny_model, monkeypatch):
        callback = OldWithGradient(monkeypatch)
        found(tmp_path, tiny_model, "old_attached", "adds up to exactly 0", by=0, callbacks=[callback])

    def test_detached_forward(self, tmp_path, tiny_model, monkeypatch):
        right = Policy._hidden
        monkeypatch.setattr(Policy, "_hidden", lambda self, batch: right(self, batch).detach().requires_grad_())
        found(tmp_path, tiny_model, "wrong_gradient", "but not the parameters", by=0)

    def test_cleared_before_the_step(self, tmp_path, tiny_model):
        found(tmp_path, tiny_model, "skipped_steps", "were cleared", by=0, callbacks=[ClearsGradient()])

    def test_never_cleared(self, tmp_path, tiny_model, monkeypatch):
        monkeypatch.setattr(GRPOModule, "optimizer_zero_grad", lambda self, *args, **settings: None)
        found(tmp_path, tiny_model, "gradient_accumulated", "earlier updates are still there", by=1)

    def test_scrambled(self, tmp_path, tiny_model):
        class Scramble(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                for parameter in pl_module.policy.trainable_parameters().values():
                    parameter.grad = parameter.grad[torch.randperm(len(parameter.grad))]

        with pytest.raises(DegeneracyError):
            fit(tmp_path, tiny_model, doctor=(doctor := Doctor()), callbacks=[Scramble()])
        assert doctor.causes() & {"wrong_gradient", "wrong_direction"}

    def test_flipped(self, tmp_path, tiny_model):
        class Flip(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                for parameter in pl_module.policy.trainable_parameters().values():
                    parameter.grad.neg_()

        found(tmp_path, tiny_model, "wrong_direction", "moves against its loss", by=2, callbacks=[Flip()])


class Configured(GRPOModule):
    """A module with another optimizer."""

    def configure_optimizers(self):
        return self.make(list(self.policy.trainable_parameters().values()))


class TestOptimizer:
    def test_lr_zero(self, tmp_path, tiny_model):
        found(tmp_path, tiny_model, "lr_zero", "nothing will raise it", by=0, module={"learning_rate": 0.0})

    def test_schedule_that_stays_at_zero(self, tmp_path, tiny_model, monkeypatch):
        monkeypatch.setattr(GRPOModule, "_lr_factor", lambda self: lambda step: step // 1000)
        found(tmp_path, tiny_model, "lr_zero", "0 for 3 updates in a row", by=2)

    def test_half_frozen(self, tmp_path, tiny_model, monkeypatch):
        configure = GRPOModule.configure_model

        def freeze(self):
            configure(self)
            for name, parameter in self.policy.model.named_parameters():
                if "self_attn" in name:
                    parameter.requires_grad_(False)

        monkeypatch.setattr(GRPOModule, "configure_model", freeze)
        found(tmp_path, tiny_model, "frozen_parameters", "16 parameters", "self_attn", by=0)

    def test_frozen_later(self, tmp_path, tiny_model):
        class Freeze(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_step == 1:
                    next(iter(pl_module.policy.trainable_parameters().values())).requires_grad_(False)

        found(tmp_path, tiny_model, "frozen_parameters", "1 parameters", by=1, callbacks=[Freeze()])

    @pytest.mark.parametrize("choose", ["half", "copies"])
    def test_not_in_the_optimizer(self, tmp_path, tiny_model, choose):
        class Partly(Configured):
            def make(self, parameters):
                if choose == "half":
                    return AdamW(parameters[::2])
                return AdamW([torch.nn.Parameter(p.detach().clone()) for p in parameters])

        found(tmp_path, tiny_model, "not_in_optimizer", "does not hold", by=0, kind=Partly)

    @pytest.mark.parametrize("skip", ["all", "second"])
    def test_skipped(self, tmp_path, tiny_model, monkeypatch, skip):
        right, taken = AdamW.step, []

        def step(self, closure):
            taken.append(1)
            return right(self, closure) if skip == "second" and len(taken) != 2 else closure()

        monkeypatch.setattr(AdamW, "step", step)
        by = 1 if skip == "all" else 2
        found(tmp_path, tiny_model, "skipped_steps", "it was skipped", by=by)

    def test_closure_without_a_step(self, tmp_path, tiny_model):
        class Lazy(GRPOModule):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                optimizer_closure()

        found(tmp_path, tiny_model, "skipped_steps", "2 of 2 updates were computed", by=2, kind=Lazy)

    def test_a_step_left_out_is_no_stale_rollout(self, tmp_path, tiny_model):
        class Lazy(GRPOModule):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                optimizer_closure()
                self.weights_changed()

        fitting = trainer(tmp_path, callbacks=[RunDoctor(report=False)])
        with pytest.raises(DegeneracyError, match="^2 of 2 updates were computed"):
            fitting.fit(Lazy(tiny_model, **MODEL), data(TransformersEngine(dtype="float32"), updates_per_rollout=2))

    def test_gradient_cleared_by_clipping(self, tmp_path, tiny_model):
        class Guard(GRPOModule):
            def configure_gradient_clipping(self, optimizer, **settings):
                optimizer.zero_grad()

        found(tmp_path, tiny_model, "skipped_steps", "changed no trainable parameter", by=1, kind=Guard)

    @pytest.mark.parametrize(("updates", "causes"), [(25, set()), (2, {"wrong_direction"})])
    def test_momentum_may_go_up_for_a_while(self, tmp_path, tiny_model, monkeypatch, updates, causes):
        # Whatever the interval of the other comparison is.
        monkeypatch.setattr(StepSize, "cosine", 0.5)
        begin = StepSize.__init__

        def later(step, *args):
            begin(step, *args)
            step.first = False

        monkeypatch.setattr(StepSize, "__init__", later)
        doctor = Doctor(ascent_every=1, thresholds=Thresholds(uphill_updates=updates), reactions={"all": "log"})
        fit(tmp_path, tiny_model, doctor=doctor)
        assert {v.cause for _, v in doctor.all if v.check == "descent" and v.cause} == causes

    def test_maximizes(self, tmp_path, tiny_model):
        class Up(Configured):
            def make(self, parameters):
                return AdamW(parameters, lr=1e-3, maximize=True)

        found(tmp_path, tiny_model, "wrong_direction", "goes up the gradient", by=1, kind=Up)

    def test_weight_decay_dominates(self, tmp_path, tiny_model):
        found(tmp_path, tiny_model, "wrong_direction", "hardly the gradient's", by=2, module={"weight_decay": 500.0})

    def test_bf16_absorbs(self, tmp_path, tiny_model, monkeypatch, begun):
        configure = GRPOModule.configure_model

        def rounded(self):
            configure(self)
            for parameter in self.policy.trainable_parameters().values():
                parameter.data = parameter.data.bfloat16()

        monkeypatch.setattr(GRPOModule, "configure_model", rounded)
        module = {"learning_rate": 1e-6, "adapter": begun, "lora_rank": 16}
        found(tmp_path, tiny_model, "updates_absorbed", "round away", by=1, module=module)

    def test_rounded_after_each_step(self, tmp_path, tiny_model, monkeypatch):
        right = AdamW.step

        def step(self, closure):
            loss = right(self, closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.copy_(parameter.data.bfloat16())
            return loss

        monkeypatch.setattr(AdamW, "step", step)
        found(tmp_path, tiny_model, "updates_absorbed", "numbers of a 16-bit dtype alone", by=1)

    def test_a_norm_of_the_base_is_trained(self, tmp_path, tiny_model):
        class Further(Configured):
            def make(self, parameters):
                norm = next(p for name, p in self.policy.model.named_parameters() if "norm" in name)
                return AdamW([*parameters, norm.requires_grad_()], lr=1e-3)

        found(tmp_path, tiny_model, "base_changed", "also holds 1 parameters", "norm", by=0, kind=Further)

    def test_clipped_to_nothing(self, tmp_path, tiny_model):
        class Plain(Configured):
            def make(self, parameters):
                return SGD(parameters, lr=1e-3)

        with pytest.warns(UserWarning, match="2 steps in a row were smaller than 0.001") as warned:
            fit(tmp_path, tiny_model, run={"gradient_clip_val": 1e-9}, kind=Plain)
        assert sum("steps in a row" in str(w.message) for w in warned) == 1


class Restores(Callback):
    """Undoes each step before the next update, and leaves noise if asked."""

    def __init__(self, noise):
        self.start, self.noise = {}, noise

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for name, parameter in pl_module.policy.trainable_parameters().items():
            start = self.start.setdefault(name, parameter.detach().clone())
            parameter.data.copy_(start + self.noise * torch.randn_like(start))


class TestFrozen:
    def test_forward_with_a_snapshot(self, tmp_path, tiny_model, monkeypatch):
        Held(monkeypatch)
        found(tmp_path, tiny_model, "policy_frozen", "logprobs do not", by=2)

    def test_behind_dropout(self, tmp_path, tiny_model, monkeypatch, begun):
        Held(monkeypatch)
        module = {"lora_dropout": 0.1, "adapter": begun, "lora_rank": 16}
        found(tmp_path, tiny_model, "frozen_behind_dropout", "Dropout", "lora_dropout", by=2, module=module)

    def test_behind_noise_on_the_snapshot(self, tmp_path, tiny_model, monkeypatch):
        held = Held(monkeypatch)

        class Disturb(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                for weight in held.weights.values():
                    weight.add_(1e-3 * torch.randn_like(weight))

        found(tmp_path, tiny_model, "frozen_behind_noise", "Noise on the weights", by=2, callbacks=[Disturb()])

    def test_behind_perturbation(self, tmp_path, tiny_model, monkeypatch):
        Held(monkeypatch)
        settings = {"callbacks": [ParameterPerturbation()], "samples": {"updates_per_rollout": 1}}
        found(tmp_path, tiny_model, "frozen_behind_noise", "ParameterPerturbation", by=2, **settings)

    @pytest.mark.parametrize(("noise", "cause"), [(0.0, "parameters_stuck"), (1e-6, "frozen_behind_noise")])
    def test_steps_undone(self, tmp_path, tiny_model, noise, cause):
        found(tmp_path, tiny_model, cause, "was undone", by=1, callbacks=[Restores(noise)])


class Momentum(Configured):
    def make(self, parameters):
        return SGD(parameters, lr=0.1, momentum=0.9)


HEALTHY = {
    "accumulation": {"run": {"accumulate_grad_batches": 3}},
    "warm-up from 0": {"module": {"warmup_updates": 3}},
    "decay to 0": {"module": {"lr_schedule": "linear"}},
    "dropout": {"module": {"lora_dropout": 0.1}},
    "kl": {"module": {"kl_coef": 0.1}},
    "inner epochs, large steps": {"module": {"learning_rate": 3e-3}, "samples": {"inner_epochs": 4}},
    "clipping": {"run": {"gradient_clip_val": 0.01}},
    "weight decay": {"module": {"weight_decay": 0.1}},
    "momentum": {"kind": Momentum},
    "mean over tokens": {"module": {"aggregation": "token"}},
    "solved task": {"samples": {"reward": lambda completion: 1.0}},
    "solved task with kl": {"samples": {"reward": lambda completion: 1.0}, "module": {"kl_coef": 0.1}},
    "full fine-tuning": {"module": {"full_finetuning": True, "lora_rank": 16, "learning_rate": 1e-4}},
    "bfloat16 base": {"module": {"dtype": "bfloat16"}},
    "bf16-mixed": {"run": {"precision": "bf16-mixed"}},
    "a long decay": {"module": {"lr_schedule": "linear"}, "run": {"max_epochs": 20}},
    "long decay of a small rate": {
        "module": {"lr_schedule": "linear", "learning_rate": 1e-6},
        "run": {"max_epochs": 20},
    },
    "warm-up and decay": {"module": {"warmup_updates": 10, "lr_schedule": "linear"}, "run": {"max_epochs": 20}},
    "tiny steps": {"module": {"learning_rate": 1e-8}, "run": {"max_epochs": 6}},
    "small steps": {"module": {"learning_rate": 1e-7}},
    "huge steps": {"module": {"learning_rate": 0.1}},
    "perturbation": {"callbacks": [ParameterPerturbation()]},
    "few samples": {"samples": {"prompts_per_rollout": 2, "samples_per_prompt": 2}},
    "fillers": {"run": {"accumulate_grad_batches": 8}, "samples": {"prompts_per_rollout": 2}},
}


@pytest.mark.parametrize("settings", HEALTHY.values(), ids=HEALTHY)
def test_healthy_runs_are_left_alone(tmp_path, tiny_model, settings):
    doctor = Doctor()
    fit(tmp_path, tiny_model, doctor=doctor, **{**settings, "run": {"max_epochs": 4, **settings.get("run", {})}})
    assert doctor.causes() <= {"other_weights", "mismatch"}  # dropout in the trainer alone
    assert doctor.steps >= 4


@pytest.mark.parametrize("learning_rate", [0.2, 1.0])
def test_steps_far_too_large_are_no_wrong_gradient(tmp_path, tiny_model, learning_rate):
    doctor = Doctor(ascent_every=1, reactions={"all": "log"})
    module = {"learning_rate": learning_rate}
    fit(tmp_path, tiny_model, doctor=doctor, module=module, run={"max_epochs": 4}, samples={"updates_per_rollout": 2})
    assert doctor.causes().isdisjoint({"wrong_gradient", "wrong_direction"})
    assert any(v.check == "ascent" and v.status is Status.PASS for _, v in doctor.all)


def test_the_reference_is_computed_for_the_loss_alone(tmp_path, tiny_model, monkeypatch):
    computed = []
    right = Policy.reference
    monkeypatch.setattr(Policy, "reference", lambda self: computed.append(self.training) or right(self))
    doctor = Doctor(ascent_every=1)
    fit(tmp_path, tiny_model, doctor=doctor, module={"kl_coef": 0.1, "lora_dropout": 0.1})
    assert [v for _, v in doctor.all if v.check == "ascent"], "the comparison was made"
    assert len(computed) == doctor.steps

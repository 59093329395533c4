"""Faults in what is trained, and in how the step is taken."""

from typing import Any

import torch
from lightning.pytorch import Callback
from torch.optim import SGD, AdamW

from benchmarks.faults.fault import PRE_FLIGHT, Stage, fault, updates
from grpo_lightning.adapters import save_adapter
from grpo_lightning.loading import load_policy
from grpo_lightning.module import GRPOModule
from grpo_lightning.policy import Policy


@fault("lr_zero", deadline=updates(1))
def lr_zero(stage: Stage) -> None:
    """The learning rate is 0."""
    stage.module["learning_rate"] = 0.0


@fault("lr_zero", deadline=updates(3))
def lr_schedule_stuck(stage: Stage) -> None:
    """A schedule in integer arithmetic: the warm-up's factor stays 0."""
    stage.wrap(GRPOModule, "_lr_factor", lambda right: lambda self: lambda step: step // 1000)


@fault("frozen_parameters", deadline=PRE_FLIGHT)
def frozen_parameters(stage: Stage) -> None:
    """Half of the adapter is frozen: all layers of self-attention."""

    def freeze(configure: Any) -> Any:
        def wrong(self: GRPOModule) -> None:
            configure(self)
            for name, parameter in self.policy.model.named_parameters():
                if "self_attn" in name:
                    stage.note(parameter.requires_grad)
                    parameter.requires_grad_(False)

        return wrong

    stage.wrap(GRPOModule, "configure_model", freeze)


def _optimizer_over(choose: Any) -> Any:
    """`GRPOModule.configure_optimizers` with other parameters."""

    def make(configure: Any) -> Any:
        def wrong(self: GRPOModule) -> Any:
            right = configure(self)
            group = right["optimizer"].param_groups[0]
            group["params"] = choose(self.policy.trainable_parameters())
            return right

        return wrong

    return make


@fault("not_in_optimizer", deadline=PRE_FLIGHT)
def not_in_optimizer(stage: Stage) -> None:
    """The optimizer was given the A matrices of the adapter alone."""
    choose = _optimizer_over(lambda named: [p for name, p in named.items() if "lora_A" in name])
    stage.wrap(GRPOModule, "configure_optimizers", choose)


@fault("not_in_optimizer", deadline=PRE_FLIGHT)
def optimizer_of_copies(stage: Stage) -> None:
    """The optimizer was made before the model was moved: it holds copies of the parameters."""
    choose = _optimizer_over(lambda named: [torch.nn.Parameter(p.detach().clone()) for p in named.values()])
    stage.wrap(GRPOModule, "configure_optimizers", choose)


@fault("policy_collapsed", deadline=updates(8), reaction="warn")
def learning_rate_without_its_exponent(stage: Stage) -> None:
    """The learning rate lost a part of its exponent, 2e-1 for 2e-4: the policy falls apart in a few updates."""
    stage.module["learning_rate"] = 2e-1
    stage.data["inner_epochs"] = 8


class _PoisonGradient(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        next(p for p in pl_module.policy.parameters() if p.grad is not None).grad[0, 0] = torch.nan


@fault("gradient_not_finite", deadline=updates(2))
def nan_steps_skipped(stage: Stage) -> None:
    """Gradients are NaN, and a guard skips such steps without a word."""
    stage.callbacks.append(_PoisonGradient())

    def careful(step: Any) -> Any:
        def wrong(self: Any, closure: Any = None) -> Any:
            loss = closure()
            parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            return loss if any(not p.grad.isfinite().all() for p in parameters) else step(self)

        return wrong

    stage.wrap(AdamW, "step", careful)


@fault("skipped_steps", deadline=updates(2))
def steps_skipped(stage: Stage) -> None:
    """A loss scaler that found an overflow once goes on skipping every step."""
    stage.wrap(AdamW, "step", lambda right: lambda self, closure=None: closure())


@fault("skipped_steps", deadline=updates(4))
def every_other_step_skipped(stage: Stage) -> None:
    """Every second optimizer step is skipped."""
    taken: list[int] = []

    def alternate(right: Any) -> Any:
        def wrong(self: Any, closure: Any = None) -> Any:
            taken.append(1)
            return closure() if len(taken) % 2 == 0 else right(self, closure)

        return wrong

    stage.wrap(AdamW, "step", alternate)


@fault("skipped_steps", deadline=updates(2))
def step_left_out(stage: Stage) -> None:
    """An override of optimizer_step computes the gradient and never steps."""
    stage.wrap(
        GRPOModule,
        "optimizer_step",
        lambda right: lambda self, epoch, batch_idx, optimizer, optimizer_closure=None: optimizer_closure(),
    )


def begun_adapter(stage: Stage, scale: float = 0.003) -> str:
    """Folder of an adapter for the stage's model with values as if it had been trained."""
    policy = load_policy(stage.model, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            parameter.data = parameter.data.bfloat16().float()
    folder = stage.folder / "begun"
    save_adapter(policy, folder)
    return str(folder)


@fault("updates_absorbed", deadline=updates(2))
def bf16_absorption(stage: Stage) -> None:
    """The optimizer's master copy of a continued adapter is bfloat16, which cannot take steps of this size."""
    stage.module |= {"learning_rate": 1e-6, "adapter": begun_adapter(stage)}

    def rounded(step: Any) -> Any:
        def wrong(self: Any, closure: Any = None) -> Any:
            loss = step(self, closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.data.copy_(parameter.data.bfloat16())
            return loss

        return wrong

    stage.wrap(AdamW, "step", rounded)


@fault("updates_absorbed", deadline=updates(2))
def adapter_in_bf16(stage: Stage) -> None:
    """The trainer itself converts a continued adapter to bfloat16, as a conversion of the whole module does."""
    stage.module |= {"learning_rate": 1e-6, "adapter": begun_adapter(stage)}

    def converted(configure: Any) -> Any:
        def wrong(self: GRPOModule) -> None:
            fresh = not hasattr(self, "policy")
            configure(self)
            for parameter in self.policy.trainable_parameters().values() if fresh else ():
                parameter.data = parameter.data.bfloat16()

        return wrong

    stage.wrap(GRPOModule, "configure_model", converted)


@fault("step_too_small", deadline=updates(2), reaction="warn")
def clipped_to_nothing(stage: Stage) -> None:
    """The gradient is clipped to a norm of 1e-9, and the optimizer is SGD: steps of 1e-13."""
    stage.trainer["gradient_clip_val"] = 1e-9
    stage.wrap(
        GRPOModule,
        "configure_optimizers",
        lambda right: lambda self: SGD(self.policy.trainable_parameters().values(), lr=1e-4),
    )


@fault("gradient_accumulated", deadline=updates(2))
def gradients_not_cleared(stage: Stage) -> None:
    """Gradients are never cleared: each step sees the sum of all earlier ones."""
    stage.wrap(GRPOModule, "optimizer_zero_grad", lambda right: lambda self, *args, **settings: None)


@fault("wrong_direction", deadline=updates(25))
def weight_decay_dominates(stage: Stage) -> None:
    """A weight decay of 2,000 that stands for 0.002: each step is decay, hardly gradient."""
    stage.module |= {"weight_decay": 2000.0}
    stage.data["inner_epochs"] = 8


@fault("base_changed", deadline=updates(2))
def base_trained(stage: Stage) -> None:
    """The optimizer also holds a norm of the frozen base model, which nobody publishes."""

    def also(configure: Any) -> Any:
        def wrong(self: GRPOModule) -> Any:
            right = configure(self)
            norm = next(p for name, p in self.policy.model.named_parameters() if "norm" in name)
            norm.requires_grad_(True)
            right["optimizer"].param_groups[0]["params"].append(norm)
            return right

        return wrong

    def without(right: Any) -> Any:
        return lambda self: {name: p for name, p in right(self).items() if "norm" not in name}

    stage.wrap(Policy, "trainable_parameters", without)
    stage.wrap(GRPOModule, "configure_optimizers", also)


class _RefillGradient(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.policy.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad[torch.randperm(len(parameter.grad))]


@fault(
    "wrong_gradient",
    "wrong_direction",
    why_alias="what is left of a scrambled gradient may by chance point against the right one",
    deadline=updates(25),
)
def gradient_scrambled(stage: Stage) -> None:
    """A hook after the backward pass puts the gradient's rows into another order."""
    stage.data["inner_epochs"] = 8
    stage.callbacks.append(_RefillGradient())

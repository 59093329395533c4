"""Every cause that the doctor can name, in causal order: of two that are found, the earlier explains the later."""

from dataclasses import dataclass
from typing import Literal

Reaction = Literal["halt", "warn", "log"]
"""What to do about a failed check: raise, warn, or write it down alone."""


@dataclass(frozen=True)
class Cause:
    """What can be wrong.

    Attributes:
        name: Stable name, for programs.
        check: The check that finds it.
        title: The same for people, as a statement.
        reaction: What is done about it unless told otherwise.
    """

    name: str
    check: str
    title: str
    reaction: Reaction = "halt"


CAUSES: tuple[Cause, ...] = (
    # What is known exactly, of the rollout: who chose each token, and what it was worth.
    Cause("logprobs_missing", "rollout logprobs", "the sampler returned no logprobs, or NaN"),
    Cause("logprobs_zero", "sampler logprobs", "missing logprobs were filled in with zeros"),
    Cause("logprobs_constant", "sampler logprobs", "the sampler's logprobs are all alike"),
    Cause("logprobs_copied", "sampler logprobs", "the sampler's logprobs were replaced by the trainer's"),
    Cause("logprobs_replaced", "sampled tokens", "the stored logprobs are not those that the engine returned"),
    Cause("retokenised", "sampled tokens", "the trained tokens are not the ones that were sampled"),
    Cause("context_changed", "sampled tokens", "completions are trained behind other tokens than they were sampled"),
    Cause("forced_in_mask", "token sources", "forced tokens are trained on as if the policy had chosen them"),
    Cause("environment_in_mask", "token sources", "the environment's tokens are trained on"),
    # A step that was left out makes the rollout that follows look old.
    Cause("skipped_steps", "optimizer steps", "optimizer steps are skipped"),
    Cause("stale_rollout", "rollout age", "the rollout was sampled by an older policy than declared"),
    Cause("samples_repeated", "sample diversity", "the samples of a group are copies of each other"),
    Cause("tasks_repeated", "task order", "every rollout draws the same tasks", "warn"),
    Cause("groups_mixed", "groups", "advantages compare samples of different prompts"),
    Cause("groups_shuffled", "equal answers", "rewards are given to the wrong samples", "warn"),
    Cause("rewards_wrong", "rewards again", "rewards are not those of the completions they stand beside", "warn"),
    Cause("rewards_constant", "rewards", "no two samples of a prompt ever have different rewards", "warn"),
    Cause("advantages_zero", "advantages", "all advantages are zero although rewards vary"),
    Cause("advantages_sign", "advantages", "better samples have lower advantages"),
    Cause("advantages_wrong", "advantages", "the advantages do not follow from the rewards"),
    Cause("all_masked", "loss weights", "no token has a weight in the loss"),
    Cause("wrong_count", "loss weights", "the loss is averaged over the wrong count"),
    Cause("never_stops", "endings", "completions never end by themselves", "warn"),
    Cause("answers_empty", "endings", "all completions are empty", "warn"),
    Cause("template", "chat template", "the chat template does not do what training needs"),
    # Which parameters are trained, and with what.
    Cause("frozen_parameters", "trained parameters", "parameters that should be trained are frozen"),
    Cause("not_in_optimizer", "trained parameters", "the optimizer does not hold all trained parameters"),
    Cause("lr_zero", "learning rate", "the learning rate is 0"),
    Cause("base_changed", "base weights", "the frozen base model changes during training"),
    # Numbers and gradients of the update.
    Cause("not_finite", "finite", "logprobs are NaN or infinite"),
    Cause("gradient_not_finite", "finite gradient", "the gradient is NaN or infinite"),
    Cause("gradient_zero", "gradient", "no gradient reaches the trained parameters"),
    Cause("old_recomputed", "old logprobs", "old logprobs are recomputed by the current policy"),
    Cause("old_replaced", "old logprobs", "old logprobs are not the ones that the sampler stored"),
    Cause("old_attached", "gradient", "the old logprobs carry a gradient, which cancels the new ones'"),
    Cause("wrong_sign", "gradient", "the loss has the wrong sign"),
    Cause("wrong_scale", "gradient", "the gradient has the wrong size"),
    Cause("wrong_gradient", "gradient", "the gradient is not that of the loss"),
    Cause("gradient_accumulated", "gradient", "gradients of earlier updates were not cleared"),
    # What the trainer computes, and what the engine serves.
    Cause("wrong_forward", "forward pass", "the trainer's own logprobs are not those of its model"),
    Cause("base_differs", "base agreement", "trainer and engine hold different base models"),
    Cause("adapter_rounded", "published adapter", "the adapter is rounded when it is published"),
    Cause("adapter_resolution", "adapter resolution", "the engine's precision loses the adapter's updates", "warn"),
    Cause("adapter_changed", "published adapter", "what is published is not the trainer's adapter"),
    Cause("adapter_partial", "marker", "the engine applies only a part of the adapter"),
    Cause("adapter_scale", "marker", "the engine applies the adapter with another scale"),
    Cause("sync_noop", "marker", "publishing does not change what the engine serves"),
    Cause("adapter_ignored", "marker", "the engine ignores the adapter"),
    Cause("sync_stale", "canary", "the engine serves an older version than it reports"),
    Cause("merged_rounding", "marker", "the engine serves an adapter that was merged in low precision"),
    Cause("prefix_cache_stale", "prefix cache", "the engine answers from a cache that an older adapter filled"),
    # What its logprobs mean.
    Cause("shifted_logprobs", "alignment", "logprobs are shifted against their tokens"),
    Cause("logprob_units", "logprob semantics", "the engine's logprobs are not natural logarithms"),
    Cause("raw_logprobs", "logprob semantics", "the engine returns raw logprobs, not those it sampled from"),
    Cause("wrong_temperature", "logprob semantics", "engine and trainer use different temperatures"),
    Cause(
        "truncated_sampling", "logprob semantics", "the engine cuts off unlikely tokens, and not as the run declares"
    ),
    Cause("other_weights", "mismatch", "the engine samples with other weights than the trainer holds"),
    Cause("mismatch", "mismatch", "trainer and engine disagree and no known cause explains it"),
    Cause("noisy_forward", "train-mode noise", "the trainer's own logprobs are noise beside the update", "warn"),
    Cause("foreign_tokens", "sampling distribution", "tokens were not drawn from the policy's distribution"),
    Cause("sharpened_sampling", "sampling distribution", "tokens were drawn from a sharper distribution"),
    Cause("reference_wrong", "reference", "the reference is not the policy that training started from"),
    # What the step did.
    Cause("parameters_stuck", "parameters move", "the optimizer step changes no parameter"),
    Cause("updates_absorbed", "parameters move", "updates round away in the parameters' dtype"),
    Cause("step_too_small", "parameters move", "steps are too small to change anything", "warn"),
    Cause("processes_diverged", "processes", "the processes train different weights"),
    Cause("policy_frozen", "ratio", "the policy's logprobs do not change although its parameters do"),
    Cause("frozen_behind_dropout", "ascent", "a frozen policy looks alive because of train-mode noise"),
    Cause("frozen_behind_noise", "ascent", "a frozen policy looks alive because its weights are perturbed"),
    Cause("wrong_direction", "ascent", "the policy does not move the way its advantages say"),
    Cause("policy_collapsed", "policy", "the policy has lost its entropy or left the trust region", "warn"),
)
"""All of them, in causal order."""

ORDER = {cause.name: rank for rank, cause in enumerate(CAUSES)}
"""Causal rank of each cause."""

BY_NAME = {cause.name: cause for cause in CAUSES}

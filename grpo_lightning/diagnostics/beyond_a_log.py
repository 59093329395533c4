"""The checks of which nothing can be applied to a log of scalars, and what each of them needs."""

from grpo_lightning.diagnostics.verdict import Status, Verdict

BEYOND_A_LOG = "This log of scalars does not hold"
"""How the reason begins where nothing of a check can be applied."""

_NEEDS = {
    "rollout logprobs": "the sampled tokens with their logprobs",
    "sampler logprobs": "the difference between sampler and trainer",
    "sampled tokens": "the tokens as they were sampled and as they were trained on",
    "token sources": "who chose each token",
    "rollout age": "the policy version that sampled each rollout",
    "sample diversity": "the completions of each group",
    "task order": "the task of each rollout",
    "groups": "the prompt of each sample beside its advantage",
    "advantages": "rewards and advantages sample by sample",
    "loss weights": "each token's weight in the loss",
    "chat template": "the tokenizer and its template",
    "trained parameters": "the optimizer and the parameters",
    "base weights": "the frozen weights, before and after",
    "old logprobs": "the old logprobs that the loss used, beside the stored ones",
    "optimizer steps": "the optimizer's own count of its steps",
    "parameters move": "the parameters before and after a step",
    "processes": "a digest of the weights of each process",
    "train-mode noise": "two forward passes with the same weights",
    "ascent": "the logprobs of the same tokens before and after a step",
    "ratio": "the spread of the PPO ratio",
    "reference": "the KL to the reference",
}
"""What a check needs that the log does not hold; the engine itself for those that are not named."""


def beyond_a_log(check: str) -> Verdict:
    """The answer of a check that needs more.

    Args:
        check: Its name.
    """
    need = _NEEDS.get(check, "what the engine answers to the tokens that the trainer scores")
    return Verdict(check, Status.NO_POWER, f"{BEYOND_A_LOG} {need}; RunDoctor sees it.")

"""Limits and choices of multi-turn episodes."""

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from grpo_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class EpisodeSettings:
    """How episodes are played.

    Args:
        max_turns: Most actions of an episode; one that goes on is cut off there.
        max_context: Longest context in tokens, prompt, answers and observations together. By default
            ``max_prompt_tokens + (2 * max_turns - 1) * max_tokens``, but not more than the model's own.
        max_sampled_tokens: Most tokens that the policy may say in an episode; no limit by default.
        timeout: Seconds after its first observation when an episode is cut off, even in the middle of an answer; a call
            of the environment that has begun is waited for. No limit by default.
        step_timeout: Seconds that one call of the environment may take, before the episode counts as broken.
        stall_warning: Seconds after which a call of the environment that is not over is reported.
        retries: How often a broken episode is begun again from its seed before it is left out.
        concurrency: Most environments of a kind that are open at once; no limit by default.
        invalid_action: What follows an action that the environment cannot read: its error ``"message"`` goes back to
            the policy, the environment's ``"default"`` action is made in the policy's place, or the episode comes to
            its ``"end"``.
        truncated_action: What follows an action that was cut off by ``max_tokens``: the ``"end"`` of the episode, or
            it is taken like any other (``"step"``).
        thinking: For chat templates that strip the thinking of earlier turns: ``"keep"`` it in the context, so that
            the episode stays one sequence, or ``"split"`` the episode into sequences as the template shows them.
        context_limit: What happens when the context is full: the episode comes to its ``"end"``, or is ``"split"``: it
            goes on in a new sequence with its opening, its last answer and what was said to that.
        advantage: ``"episode"`` gives all turns the advantage of the whole, ``"reward_to_go"`` each turn that of the
            rewards from there on.
    """

    max_turns: int = 16
    max_context: int | None = None
    max_sampled_tokens: int | None = None
    timeout: float | None = None
    step_timeout: float = 60.0
    stall_warning: float = 20.0
    retries: int = 2
    concurrency: int | None = None
    invalid_action: Literal["message", "default", "end"] = "message"
    truncated_action: Literal["end", "step"] = "end"
    thinking: Literal["keep", "split"] = "keep"
    context_limit: Literal["end", "split"] = "end"
    advantage: Literal["episode", "reward_to_go"] = "episode"

    def __post_init__(self) -> None:
        for name in (
            "max_turns",
            "max_context",
            "max_sampled_tokens",
            "timeout",
            "step_timeout",
            "stall_warning",
            "concurrency",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"expected episodes.{name} > 0, but got {value}")
        if self.retries < 0:
            raise ConfigurationError(f"expected episodes.retries >= 0, but got {self.retries}")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                known = ", ".join(map(repr, get_args(hint)))
                raise ConfigurationError(
                    f"expected episodes.{name} to be one of {known}, but got {getattr(self, name)!r}"
                )

    def context(self, max_prompt_tokens: int, max_tokens: int, own: int | None) -> int:
        """Longest context in tokens.

        Args:
            max_prompt_tokens: Longest prompt.
            max_tokens: Longest answer.
            own: Longest context of the model; None if it is not known.

        Raises:
            ConfigurationError: If ``max_context`` is longer than the model's, or not longer than a prompt.
        """
        if self.max_context is None:
            # As much for what the environment says as for the policy.
            most = max_prompt_tokens + (2 * self.max_turns - 1) * max_tokens
            return most if own is None else min(own, most)
        if self.max_context <= max_prompt_tokens:
            raise ConfigurationError(
                f"expected episodes.max_context > max_prompt_tokens, but got {self.max_context} and "
                f"{max_prompt_tokens}: no answer would fit behind the longest prompt"
            )
        if own is not None and self.max_context > own:
            raise ConfigurationError(
                f"expected episodes.max_context <= {own}, the model's context, but got {self.max_context}"
            )
        return self.max_context


SINGLE_TURN = EpisodeSettings(max_turns=1)
"""Of questions that are answered once."""

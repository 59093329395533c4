"""How completions end."""

from collections.abc import Sequence

from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.chat_template import TemplateFacts
from grpo_lightning.rollout.episode import Group

MIN_TURNS = 32
"""Fewer turns than this say nothing of how completions end."""

MAX_TRUNCATED = 0.95
"""Share of truncated completions beyond which they do not end by chance."""


def check_endings(groups: Sequence[Group], stop_token_ids: Sequence[int], template: TemplateFacts | None) -> Verdict:
    """Completions end, and say something before they do.

    Args:
        groups: The rollout.
        stop_token_ids: Tokens that end a completion.
        template: How the chat template ends an answer; None for plain prompts.
    """
    name = "endings"
    actions = [t.action for g in groups for e in g.episodes for t in e.turns if not t.action.was_forced]
    if len(actions) < MIN_TURNS:
        return Verdict(name, Status.NO_POWER, f"Only {len(actions)} turns; needs {MIN_TURNS}.")
    stops = set(stop_token_ids)
    # What ends before it says anything shows nothing of how answers end.
    said = [action for action in actions if set(action.token_ids) - stops]
    truncated = sum(action.finish_reason == "length" for action in said) / max(1, len(said))
    stopped = sum(bool(stops & set(action.token_ids)) for action in said)
    empty = sum(not action.text.strip() for action in actions)
    evidence: dict[str, float | int | str] = {
        "turns": len(actions),
        "with more than a stop token": len(said),
        "share of these cut off": truncated,
        "allowed share": MAX_TRUNCATED,
        "of these with a stop token": stopped,
        "empty": empty,
    }
    if template is not None and not template.end_stops:
        passed_over = sum(template.end_id in action.token_ids for action in actions)
        evidence["with an end that was passed over"] = passed_over
        if passed_over > len(actions) / 2:
            return Verdict(
                name,
                Status.FAIL,
                f"{passed_over} of {len(actions)} completions go on behind {template.end!r}, with which the "
                "template ends an answer: rewards judge what was said after the turn was over.",
                f"Add {template.end!r} to stop, or to eos_token_id in the model's generation_config.json.",
                evidence,
                cause="template",
                ruled_out=("a base model that does not know the token (it would not say it)",),
            )
    if truncated > MAX_TRUNCATED and not stopped and len(said) > len(actions) / 2:
        return Verdict(
            name,
            Status.FAIL,
            f"Of {len(said)} completions that say something {truncated:.0%} were cut off, and none holds a token that "
            "would end it.",
            "Raise max_tokens, give a stop text, or use a model and chat template whose turns end with one of its stop "
            "tokens. A reward for short answers helps only once some end.",
            evidence,
            cause="never_stops",
        )
    if empty == len(actions):
        return Verdict(
            name,
            Status.FAIL,
            f"All {len(actions)} completions are empty: the policy ends its turn at once.",
            "Look at the prompt's last tokens (grpo-lightning trajectories): does the assistant's turn begin there?",
            evidence,
            cause="answers_empty",
        )
    return Verdict(name, Status.PASS, evidence=evidence)

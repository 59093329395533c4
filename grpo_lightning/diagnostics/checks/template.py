"""What a chat template must do for training."""

from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.chat_template import TemplateFacts


def check_template(facts: TemplateFacts | None) -> Verdict:
    """It shows a conversation always alike, and asks for an answer.

    Args:
        facts: What it does; None for plain prompts.
    """
    name = "chat template"
    if facts is None:
        return Verdict(name, Status.NO_POWER, "Plain prompts pass through no chat template.")
    evidence: dict[str, float | int | str] = {
        "template": facts.name,
        "generation prompt": repr(facts.generation_prompt),
        "an answer ends with": repr(facts.end),
        "completions end with": ", ".join(map(repr, facts.stops)),
    }

    def failed(message: str, fix: str) -> Verdict:
        return Verdict(name, Status.FAIL, message, fix, evidence, cause="template")

    if len(set(facts.renderings)) > 1:
        return failed(
            f"The chat template of {facts.name} shows the same conversation differently each time.",
            "Give one without dates, times or chance: chat_template=FILE.",
        )
    if facts.asks and not facts.generation_prompt:
        return failed(
            f"The chat template of {facts.name} does not begin the assistant's turn when it is asked to: "
            "the policy would go on with the question.",
            "Give one that shows a generation prompt: chat_template=FILE.",
        )
    # A base model may never say that token: what it says decides, see `check_endings`.
    note = (
        "" if facts.end_stops else f"The template ends an answer with {facts.end!r}, which does not end a completion."
    )
    return Verdict(name, Status.PASS, note, evidence=evidence)

"""The documentation's table of causes: what each is called, and what is done about it."""

from grpo_lightning.diagnostics import CAUSES

_HEAD = ("Cause", "What is wrong", "Found by the check", "Reaction")


def causes_table() -> str:
    """Markdown, a row a cause, in causal order."""
    rows = [(f"`{cause.name}`", cause.title, cause.check, cause.reaction) for cause in CAUSES]
    lines = [_HEAD, ("---",) * len(_HEAD), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

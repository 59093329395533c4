"""``[name(x=1), name(y="a")]``: Llama 3.2 and 4. Literals only; nothing is evaluated."""

import ast
import re

from grpo_lightning.envs.tool_calls.reading import Format, cut_off, read_call, unreadable
from grpo_lightning.rollout.types import ToolCall

_START = r"^\[\s*[A-Za-z_][\w.]*\("
_BEGINNING = re.compile(_START, re.MULTILINE)


def _parse(text: str) -> list[ToolCall]:
    match = _BEGINNING.search(text.replace("<|python_start|>", ""))
    if not match:
        return []
    body = match.string[match.start() :].replace("<|python_end|>", "").strip()
    if not body.endswith("]"):
        return [cut_off(")]")]
    try:
        parsed = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "text that Python cannot read"
        return [unreadable(f"expected [name(argument=value), ...], but got {reason}")]
    if not isinstance(parsed, ast.List):
        return [unreadable("expected [name(argument=value), ...], but got another expression")]
    return [_call(node) for node in parsed.elts]


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call):
        return unreadable("expected name(argument=value), but got another expression")
    name = _dotted(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return unreadable("expected arguments by name, but got some without", name)
    arguments = {}
    for keyword in node.keywords:
        try:
            arguments[keyword.arg or ""] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return unreadable(f"expected a literal value for {keyword.arg}, but got an expression", name)
    return read_call(name, arguments)


def _dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


FORMAT = Format(
    # By name or not at all: [f(x), g(x)] is a formula.
    marker=re.compile(rf"{_START}\s*(?:\)|[A-Za-z_]\w*\s*=(?!=))|<\|python_start\|>\[", re.MULTILINE),
    parse=_parse,
    form="[NAME(ARGUMENT=VALUE)]",
)

"""Small models with the chat templates of large ones, for the tests of what a template makes of a conversation."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from fakes import EOS, UNKNOWN

from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {"value": {"type": "string", "description": "The word."}},
                "required": ["value"],
            },
        },
    },
)

BOS = "<bos>"

_SPECIAL = re.compile(r"<\|[^|<>{}'\"]+\|>|<｜[^｜<>]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|</?(?:start_of_turn|end_of_turn|s)>")
"""What looks like a special token in a template."""


def templates_of(package: str, folder: str) -> dict[str, Path]:
    """The Jinja files of an installed package, which is not imported."""
    spec = find_spec(package)
    assert spec is not None, f"{package} is not installed; it is one of the development dependencies"
    assert spec.origin is not None
    return {path.stem: path for path in sorted((Path(spec.origin).parent / folder).glob("*.jinja"))}


def chat_encoder(base: str, folder: Path, template: str | Path, stops=(), tokens=(), **settings) -> PromptEncoder:
    """An encoder with a tokenizer that knows the special tokens of its template.

    Args:
        base: Model with the tokenizer.
        folder: Where to put the new one.
        template: Jinja text, or a file with one.
        stops: Texts of the tokens that end a completion.
        tokens: Special tokens that the template does not name.
        settings: Of `PromptSettings`.
    """
    from transformers import AutoTokenizer

    path = template if isinstance(template, Path) else folder / "chat.jinja"
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(template, Path):
        path.write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(base)
    special = sorted({*_SPECIAL.findall(path.read_text(encoding="utf-8")), *stops, *tokens})
    tokenizer.add_special_tokens({"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ids = tokenizer.convert_tokens_to_ids(list(stops))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return PromptEncoder(str(folder), 1000, PromptSettings(chat_template=str(path), **settings))


def tokens(encoder: PromptEncoder, text: str) -> list[int]:
    """Ids of a text, special tokens in it included."""
    return encoder._tokenizer(text, add_special_tokens=False)["input_ids"]


def text(encoder: PromptEncoder, ids) -> str:
    """Text of ids, special tokens included."""
    return encoder._tokenizer.decode(list(ids))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def result(content: str) -> dict[str, str]:
    """What a tool gave."""
    return {"role": "tool", "content": content, "name": "look_up", "tool_call_id": "call12345"}

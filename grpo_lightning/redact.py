"""Keeping secrets out of what is logged and saved."""

import re
from collections.abc import Callable, Iterator
from typing import Any

REDACTED = "[redacted]"
"""What stands in place of a secret."""

_SECRET_NAME = re.compile(
    r"(?:password|passwd|passphrase|secret|credential|apikey|authorization"
    r"|\b(?:cookie|pwd|(?:api|access|private|account|signing|encryption|ssh) key|(?:hf|access|auth|api) ?token))s?\b"
    r"|\bbearer\b|\bauth$"
)
_TEXT_TOKEN_NAME = re.compile(
    r"\b(?:bos|eos|pad|unk|sep|cls|mask|stop|start|begin|end|special|think|image|audio|video|per"
    r"|(?:start|begin|end) of \w+) token$"
)
"""Names of ``token`` as a piece of text, not as a credential."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SPECIAL_TOKEN = re.compile(r"<.*>|\[[A-Z]+\]")
_URL_CREDENTIALS = re.compile(
    r"(?<=://)[^/\s:@]*:[^/\s]+(?=@)"
    # Without a password it is a key in HTTP, but a mere login name in ssh://git@host.
    r"|(?:(?<=http://)|(?<=https://))[^/\s@?#]+(?=@)"
)
_QUERY_PARAMETER = re.compile(r"(?<=[?&])([\w.-]+)=[^&#\s]+")
_SECRET_PARAMETER = re.compile(r"key|sig|.*signature", re.IGNORECASE)
"""Names that mean a credential in the query of a URL, though not elsewhere."""

_KNOWN_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}"
    r"|sk-(?=[\w-]*\d)[\w-]{16,}"
    r"|gh[opsur]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}"
    r"|xox[abeoprs]-[\w-]{10,}"
    r"|wandb_v\d+_\w{16,}"
    r"|AKIA[A-Z0-9]{16}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"
    r")"
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
)


def redact(value: Any) -> Any:
    """A copy of plain settings without their secrets.

    A value is a secret if its key says so (``api_key``, ``token``, ``password``, ``authorization``, ...; not
    ``max_tokens``, ``stop_token_ids`` or ``bos_token``). Within other text, well-known tokens (``hf_...``,
    ``sk-...``, ``ghp_...``, ...), the ``user:password`` or key before the host of a URL, and secret parameters of its
    query are replaced. None, booleans and empty text are kept as they are, and so is everything that is not a dict,
    list, tuple, text, bytes or number.

    Args:
        value: Nested dicts, lists and tuples of plain values.

    Returns:
        The same with `REDACTED` in place of each secret. Redacting twice changes nothing more.
    """
    return _walk(value, _clean)


def redacted_keys(value: Any, key: str = "") -> Iterator[str]:
    """Where secrets were left out of settings, as keys like ``data.engine.init_args.api_key`` or ``logger[0].url``.

    Args:
        value: Nested dicts, lists and tuples.
        key: Where the value itself stands.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            yield from redacted_keys(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from redacted_keys(item, f"{key}[{number}]")
    elif isinstance(value, str) and REDACTED in value:
        yield key


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a credential.

    Args:
        name: Key in any style: ``api_key``, ``apiKey``, ``WANDB_API_KEY``, ``engine.api-key``.
    """
    words = " ".join(_WORD.findall(name)).lower()
    if _SECRET_NAME.search(words):
        return True
    return re.search(r"\btoken$", words) is not None and not _TEXT_TOKEN_NAME.search(words)


def redact_hyperparameters(checkpoint: dict[str, Any]) -> None:
    """Redact, in place, the settings of module and data module in a Lightning checkpoint.

    Args:
        checkpoint: The checkpoint's content.
    """
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if key in checkpoint:
            checkpoint[key] = redact(dict(checkpoint[key]))


def _walk(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {k: _walk(v, _hide if isinstance(k, str) and is_secret_name(k) else leaf) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_walk(item, leaf) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return leaf(value)


def _clean(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return _URL_CREDENTIALS.sub(REDACTED, _QUERY_PARAMETER.sub(_clean_parameter, _KNOWN_TOKENS.sub(REDACTED, value)))


def _clean_parameter(parameter: re.Match[str]) -> str:
    name = parameter[1]
    return f"{name}={REDACTED}" if _SECRET_PARAMETER.fullmatch(name) or is_secret_name(name) else parameter[0]


def _hide(value: Any) -> Any:
    if isinstance(value, bool) or value in ("", b"") or not isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, str) and _SPECIAL_TOKEN.fullmatch(value):
        return value
    return REDACTED

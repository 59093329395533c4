"""What must be in a record for it to be read: a file can be damaged, or edited by hand."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from grpo_lightning.diagnostics.causes import Reaction
from grpo_lightning.diagnostics.verdict import Status

_RECORD = {"run": dict, "checks": list, "timeline": list, "curves": dict, "parts": dict, "settings": dict}
_CHECK = {"check": str, "message": str, "silence": str, "passed": int, "failed": int, "no_power": int}
_DIAGNOSIS = {"check": str, "title": str, "message": str, "fix": str, "text": str, "evidence": dict, "explained": list}


def check_shape(record: Mapping[str, Any]) -> None:
    """Refuse a record without what is read of every record.

    Args:
        record: What ``doctor.json`` holds.

    Raises:
        ValueError: If a key is missing or holds something else; the text names it.
    """
    _has(record, _RECORD, "the record")
    _has(record["run"], {"updates": int}, "run")
    for index, check in enumerate(record["checks"]):
        _has(check, _CHECK, f"checks[{index}]")
        _is_one_of(check, "status", {status.value for status in Status}, f"checks[{index}]")
    if "diagnosis" not in record:
        raise ValueError("the record has no 'diagnosis'")
    if record["diagnosis"] is not None:
        _has(record["diagnosis"], _DIAGNOSIS, "diagnosis")
        _is_one_of(record["diagnosis"], "reaction", set(get_args(Reaction)), "diagnosis")


def _has(found: Any, expected: Mapping[str, type], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {found!r:.40}, not an object")
    for key, kind in expected.items():
        if key not in found:
            raise ValueError(f"{where} has no {key!r}")
        if not isinstance(found[key], kind):
            raise ValueError(f"{key!r} of {where} is {found[key]!r:.40}, not of type {kind.__name__}")


def _is_one_of(found: Mapping[str, Any], key: Literal["status", "reaction"], known: set[str], where: str) -> None:
    if found.get(key) not in known:
        raise ValueError(f"{key!r} of {where} is {found.get(key)!r:.40}, not one of {', '.join(sorted(known))}")

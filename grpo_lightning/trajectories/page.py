"""Trajectories as one HTML page that needs nothing else: no server, no network, no other file."""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grpo_lightning.html_page import content_policy, filled
from grpo_lightning.trajectories.columns import epoch_columns
from grpo_lightning.trajectories.pieces import PieceTable, TokenBytes

if TYPE_CHECKING:
    from grpo_lightning.trajectories.stored import StoredEpoch

_SCRIPTS = ("data.js", "colours.js", "tokens.js", "episode.js", "sidebar.js", "app.js")
"""In the order in which they use each other."""


@dataclass(frozen=True)
class Page:
    """A page and what is on it.

    Attributes:
        html: The page.
        epochs: The epochs on it, in ascending order.
        left_out: Those that would have made it too large.
    """

    html: str
    epochs: tuple[int, ...]
    left_out: tuple[int, ...]


def render(
    title: str,
    epochs: Sequence[int],
    load: Callable[[int], "StoredEpoch"],
    token_bytes: TokenBytes | None,
    *,
    max_bytes: int = 20_000_000,
    note: str = "",
) -> Page:
    """Write the trajectories of a run's epochs as a page.

    The newest epoch is always there; older ones as long as they fit. Epochs are loaded one at a time, newest first,
    and none after the first that does not fit.

    Args:
        title: What the page is of.
        epochs: The epochs to show.
        load: Gives one of them.
        token_bytes: What a token says (`pieces.token_bytes`); None to show ids.
        max_bytes: Largest size of the page.
        note: Anything else that its reader must know.
    """
    table = PieceTable(token_bytes)
    newest_first = sorted(epochs, reverse=True)
    assets = _assets()
    size = sum(map(len, assets.values()))
    summaries: list[dict[str, Any]] = []
    scripts: list[str] = []
    for number in newest_first:
        known = len(table)
        epoch = load(number)
        script = _data(f"epoch-{number}", epoch_columns(epoch, table))
        size += len(script)
        if scripts and size + len(_pieces(table)) > max_bytes:
            table.truncate(known)
            break
        scripts.append(script)
        summaries.append(_summary(number, epoch))
    left_out = tuple(reversed(newest_first[len(scripts) :]))
    about = {"title": title, "note": note, "leftOut": left_out, "maxBytes": max_bytes, "epochs": summaries[::-1]}
    data = [_data("about", about), _pieces(table), *scripts]
    return Page(_filled(title, assets, data), tuple(row["epoch"] for row in summaries[::-1]), left_out)


def _summary(number: int, epoch: "StoredEpoch") -> dict[str, Any]:
    rewards = [e.reward for group in epoch.groups for e in group.episodes if e.reward is not None]
    return {
        "epoch": number,
        "episodes": sum(len(group.episodes) for group in epoch.groups),
        "reward": round(fmean(rewards), 4) if rewards else None,
    }


def _pieces(table: PieceTable) -> str:
    return _data("pieces", {"ids": table.ids, "texts": table.texts, "bytes": table.bytes})


def _data(name: str, value: Any) -> str:
    return f'<script type="application/json" id="{name}">{embedded_json(value)}</script>'


def embedded_json(value: Any) -> str:
    """JSON that cannot end the element it stands in, whatever text it holds: ``<``, ``>`` and ``&`` are escaped.

    So is everything outside ASCII, line separators and lone surrogates among it.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _assets() -> dict[str, str]:
    folder = resources.files("grpo_lightning.trajectories") / "viewer"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    script = '"use strict";\n(() => {\n' + "\n".join(read(name) for name in _SCRIPTS) + "})();\n"
    return {"page": read("page.html"), "style": read("style.css"), "script": script}


def _filled(title: str, assets: dict[str, str], data: Sequence[str]) -> str:
    parts = {
        "policy": content_policy(style=assets["style"], script=assets["script"]),
        "title": html.escape(title),
        "style": assets["style"],
        "data": "\n".join(data),
        "script": assets["script"],
    }
    return filled(assets["page"], parts)

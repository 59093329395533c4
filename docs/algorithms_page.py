"""Writes the list at the end of ``docs/algorithms.md`` from the docstrings: ``python -m docs.algorithms_page``.

What stands outside of its marks is written by hand and kept.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

from torch import Tensor

from grpo_lightning import GRPOModule
from grpo_lightning.early_end import is_beyond
from grpo_lightning.functional import AGGREGATIONS, CORRECTIONS, ESTIMATORS, KL_ESTIMATORS, RATIO_LEVELS, SURROGATES
from grpo_lightning.functional import correction as correction_module
from grpo_lightning.functional import kl as kl_module
from grpo_lightning.functional.entropy import (
    active_entropy_coefficient,
    adaptive_entropy_coefficient,
    high_entropy_marks,
)
from grpo_lightning.functional.kl import adaptive_coefficient
from grpo_lightning.functional.marks import covariance
from grpo_lightning.functional.reward_shaping import overlong_penalty
from grpo_lightning.functional.surrogates import MARKS

PAGE = Path(__file__).parent / "algorithms.md"
BEGIN, END = "<!-- list -->", "<!-- /list -->"
REQUIRED = ("Source", "Peers", "Use")
Function = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """Functions of one kind.

    Attributes:
        title: Heading.
        intro: How they are set.
        functions: By the setting that asks for them, ``"surrogate: clipped"``.
        module: Whose docstring explains what they have in common; None for none.
    """

    title: str
    intro: str
    functions: Mapping[str, Function]
    module: ModuleType | None = None


def _set(*settings: str) -> str:
    """Settings of `GRPOModule` with their defaults."""
    known = inspect.signature(GRPOModule).parameters
    return ", ".join(f"`{name}` ({known[name].default})" for name in settings)


def _registered(setting: str, registry: Mapping[str, Function]) -> dict[str, Function]:
    return {f"{setting}: {name}": function for name, function in registry.items()}


FAMILIES = (
    Family(
        "Ratio levels",
        "`ratio_level` of `GRPOModule`: what the surrogate's ratio compares.",
        _registered("ratio_level", RATIO_LEVELS),
    ),
    Family(
        "Surrogates",
        "`surrogate` of `GRPOModule`, or a function of your own; arguments in `surrogate_args`, both clips also as "
        "`clip_low` and `clip_high`. `A` is the advantage and `r` the ratio at the level that `ratio_level` names.",
        _registered("surrogate", SURROGATES),
    ),
    Family(
        "Advantages",
        "`advantage` of `RolloutDataModule`, or a function of your own; arguments in `advantage_args`. Rewards are "
        "`r`; samples that have none take part nowhere and have the advantage 0.",
        _registered("advantage", ESTIMATORS),
    ),
    Family(
        "Aggregations",
        "`aggregation` of `GRPOModule`: the weight of each token in the loss of an optimizer step of `S` sequences. "
        "`max_length` is `aggregation_length`, by default the longest completion that is allowed.",
        _registered("aggregation", AGGREGATIONS),
    ),
    Family(
        "KL to the reference",
        "`kl_estimator` of `GRPOModule`, weighted by `kl_coef`; `kl_in` says whether it stands in the loss or in the "
        "reward.",
        _registered("kl_estimator", KL_ESTIMATORS),
        kl_module,
    ),
    Family(
        "Corrections",
        "`correction` of `GRPOModule`, or a function of your own; arguments in `correction_args`. The ratio of the "
        "surrogate then starts at the proximal policy, as with `old_logprobs: trainer`.",
        _registered("correction", CORRECTIONS),
        correction_module,
    ),
    Family(
        "Around the loss",
        f"Each has a setting of its own. The arguments of the first two are {_set('kl_target', 'kl_horizon')}, and "
        f"{_set('entropy_target', 'entropy_step', 'entropy_max')}.",
        {
            "kl_target": adaptive_coefficient,
            "entropy_target": adaptive_entropy_coefficient,
            "entropy_share": high_entropy_marks,
            "overlong_buffer": overlong_penalty,
            "max_kl": is_beyond,
        },
    ),
)

BESIDE: Mapping[Function, tuple[Function, ...]] = {
    **{surrogate: (covariance, marks) for surrogate, marks in MARKS.items()},
    adaptive_entropy_coefficient: (active_entropy_coefficient,),
}
"""Functions that are explained together with another one."""


@dataclass(frozen=True)
class Parts:
    """What a docstring says.

    Attributes:
        summary: First sentence.
        formula: In plain text.
        text: Explanations.
        labels: Source, Peers, Use and perhaps Departs.
        arguments: By name.
    """

    summary: str
    formula: str
    text: tuple[str, ...]
    labels: Mapping[str, str]
    arguments: Mapping[str, str]


def parts_of(function: Function) -> Parts:
    """Take a docstring apart.

    Raises:
        ValueError: If it lacks one of the parts that the page shows.
    """
    body, *sections = re.split(r"^(Args|Returns|Raises):\n", inspect.getdoc(function) or "", flags=re.MULTILINE)
    summary, *paragraphs = re.split(r"\n{2,}", body.strip())
    formulas = [p for p in paragraphs if all(line.startswith("    ") for line in p.splitlines())]
    labelled = [p for p in paragraphs if re.match(r"(Source|Peers|Departs|Use): ", p)]
    labels: dict[str, str] = {}
    for paragraph in labelled:
        _, *found = re.split(r"^(Source|Peers|Departs|Use): ", paragraph, flags=re.MULTILINE)
        labels |= {name: _line(text) for name, text in zip(found[::2], found[1::2], strict=True)}
    missing = [name for name in REQUIRED if not labels.get(name)]
    missing += [name for name, part in {"formula": formulas, "summary": summary}.items() if not part]
    if missing:
        raise ValueError(f"expected a docstring with {', '.join(missing)}, but that of {_full_name(function)} has none")
    args = dict(zip(sections[::2], sections[1::2], strict=True)).get("Args", "")
    arguments = re.findall(r"^(\w+): (.*(?:\n    .*)*)", dedent(args), flags=re.MULTILINE)
    return Parts(
        _line(summary),
        "\n".join(dedent(formula) for formula in formulas),
        tuple(_line(p) for p in paragraphs if p not in formulas and p not in labelled),
        labels,
        {name: _line(text) for name, text in arguments},
    )


def settings_of(function: Function) -> dict[str, str]:
    """What may be set of a function, with its defaults as text: its keyword-only arguments that are no tensors."""
    return {
        name: "required" if p.default is p.empty else f"`{p.default!r}`"
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.annotation is not Tensor
    }


def linked(source: str) -> str:
    """A source with its addresses as links on what stands before them."""
    return re.sub(
        r"((?:^|(?<=; )|(?<=, and )))([^;]+?), (https?://[^\s;,]+)",
        lambda found: f"{found[1]}[{found[2]}]({found[3]})",
        source,
    )


def peer_names(peers: str) -> str:
    """The peers alone, without what they call it."""
    names = re.sub(r"\([^)]*\)", "", peers)
    return "none known" if names.startswith("none known") else ", ".join(name.strip() for name in names.split(","))


def written() -> str:
    """The list."""
    return "\n\n".join(part for family in FAMILIES for part in _family(family))


def with_list(page: str) -> str:
    """A page with the list between its marks, the rest as it was."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"expected the marks {BEGIN} and {END} in {PAGE.name}")
    return f"{before}{BEGIN}\n\n{written()}\n\n{END}{after}"


def _family(family: Family) -> list[str]:
    table = ["| name | what it is | source | peers | when |", "|---|---|---|---|---|"]
    details = []
    for setting, function in family.functions.items():
        parts = parts_of(function)
        name = setting.rpartition(" ")[2]
        source = re.match(r"[^,;]+", parts.labels["Source"])
        link = re.search(r"^[^;]*?(https?://[^\s;,]+)", parts.labels["Source"])
        cells = (
            f"[`{name}`](#{setting.replace(': ', '-')})",
            parts.summary,
            f"[{source[0]}]({link[1]})" if source and link else source[0] if source else "",
            peer_names(parts.labels["Peers"]),
            _sentence(parts.labels["Use"][0].upper() + parts.labels["Use"][1:]),
        )
        table.append(f"| {' | '.join(map(_cell, cells))} |")
        details += [f"### `{setting}`", *_details(function)]
        for other in BESIDE.get(function, ()):
            details += [f"**`{other.__name__}`**", *_details(other)]
    return [f"## {family.title}", family.intro, *_shared(family.module), "\n".join(table), *details]


def _details(function: Function) -> list[str]:
    parts = parts_of(function)
    arguments = [
        f"| `{name}` | {default} | {_cell(parts.arguments[name])} |" for name, default in settings_of(function).items()
    ]
    labels = {**parts.labels, "Source": linked(parts.labels["Source"])}
    return [
        parts.summary,
        f"```text\n{parts.formula}\n```",
        *parts.text,
        *(["\n".join(["| argument | default | |", "|---|---|---|", *arguments])] if arguments else []),
        "\n".join(f"- *{label}*: {_sentence(text)}" for label, text in labels.items()),
    ]


def _shared(module: ModuleType | None) -> list[str]:
    """What a module's docstring explains, without its title and its note on shapes."""
    paragraphs = (inspect.getdoc(module) or "").split("\n\n")[1:] if module else []
    return [_code(p) for p in paragraphs if not p.startswith("Shapes: ")]


def _line(text: str) -> str:
    return _code(" ".join(text.split()))


def _code(text: str) -> str:
    return re.sub("``([^`]+)``", r"`\1`", text)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _cell(text: str) -> str:
    """A bar inside of code would end the cell."""
    return re.sub(
        r"`([^`]*\|[^`]*)`", lambda found: f"<code>{found[1].replace('|', '&#124;').replace('<', '&lt;')}</code>", text
    )


def _full_name(function: Function) -> str:
    return f"{function.__module__}.{function.__qualname__}"


if __name__ == "__main__":
    PAGE.write_text(with_list(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

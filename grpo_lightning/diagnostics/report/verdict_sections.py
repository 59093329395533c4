"""What was found, in words: the headline, the causal chain, the evidence, and every check."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lightning.diagnostics.report.svg import finite, number

_WORDS = {"halt": "Failure", "warn": "Warning", "log": "Noted"}
_STATUS = {"pass": "passed", "fail": "failed", "no power": "could not tell"}

Check = Mapping[str, Any]


def escaped(value: Any) -> str:
    """Any value as text in HTML."""
    return html.escape(str(value))


def paragraphs(content: str, class_: str = "") -> str:
    """Text of several lines."""
    return "".join(f'<p class="{class_}">{escaped(row)}</p>' for row in content.splitlines() if row.strip())


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    size, large, small = (60, "min", "s") if whole < 3600 else (3600, "h", "min")
    rest = whole % size // (size // 60)
    return f"{whole // size} {large}" + (f" {rest} {small}" if rest else "")


def by_outcome(checks: Sequence[Check]) -> tuple[list[Check], list[Check], list[Check]]:
    """Checks that ever failed, those that ever passed, and those that never could tell."""
    failed = [check for check in checks if check.get("failed")]
    passed = [check for check in checks if not check.get("failed") and check.get("passed")]
    silent = [check for check in checks if not check.get("failed") and not check.get("passed")]
    return failed, passed, silent


def headline(record: Mapping[str, Any]) -> str:
    """Healthy or not in one sentence, with the fix."""
    diagnosis = record.get("diagnosis")
    _, passed, silent = by_outcome(record.get("checks", ()))
    if diagnosis:
        kind = {"halt": "bad", "warn": "warn"}.get(diagnosis.get("reaction"), "note")
        word = _WORDS.get(diagnosis.get("reaction"), "Found")
        sentence = _sentence(str(diagnosis.get("title", "")))
        fix = f'<p class="fix"><b>Fix:</b> {escaped(diagnosis["fix"])}</p>' if diagnosis.get("fix") else ""
        said = paragraphs(str(diagnosis.get("message", "")))
        head = f'<p class="word">{word}</p><h2>{escaped(sentence)}</h2>'
        return f'<section class="verdict {kind}">{head}{said}{fix}</section>'
    if not passed:
        return (
            '<section class="verdict note"><p class="word">No power</p><h2>Nothing could be judged.</h2>'
            "<p>No check failed, and none had the data to pass. Each says below what would decide.</p></section>"
        )
    counts = f"{_counted(len(passed), 'check')} passed" + (f", {len(silent)} could not tell" if silent else "")
    return (
        '<section class="verdict good"><p class="word">Healthy</p><h2>No failure was found.</h2>'
        f"<p>{counts}.</p></section>"
    )


def _sentence(statement: str) -> str:
    return statement[:1].upper() + statement[1:] + ("" if statement.endswith(".") else ".")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def diagnosis_section(diagnosis: Mapping[str, Any] | None) -> str:
    """The chain from the cause to its symptoms, the evidence, what was ruled out, the time lost; empty if healthy."""
    if not diagnosis:
        return ""
    ruled_out = "".join(f"<li>{escaped(row)}</li>" for row in diagnosis.get("ruled_out") or ())
    parts = [
        f"<section><h2>From the cause to its symptoms</h2>{_chain(diagnosis)}</section>",
        f"<section><h2>Evidence</h2>{_evidence(diagnosis.get('evidence') or {})}</section>",
        f"<section><h2>Healthy runs that look alike, ruled out</h2><ul>{ruled_out}</ul></section>" if ruled_out else "",
        f"<section><h2>Time lost</h2>{_time_lost(diagnosis)}</section>",
        "<details><summary>The whole text, as in the log and the exception</summary>"
        f"<pre>{escaped(diagnosis.get('text', ''))}</pre></details>",
    ]
    return "".join(parts)


def _chain(diagnosis: Mapping[str, Any]) -> str:
    links = [
        f'<li class="root"><b>{escaped(diagnosis.get("title", ""))}</b>{_found_by(diagnosis, "cause, found by")}</li>'
    ]
    links += [
        f"<li><b>{escaped(symptom.get('title', ''))}</b>{_found_by(symptom, 'explained by it, found by')}</li>"
        for symptom in diagnosis.get("explained") or ()
    ]
    alone = "" if len(links) > 1 else '<p class="quiet">No other check failed at that moment.</p>'
    return f'<ol class="chain">{"".join(links)}</ol>{alone}'


def _found_by(link: Mapping[str, Any], how: str) -> str:
    return f'<span class="quiet">{how} the check “{escaped(link.get("check", ""))}”</span>'


def _evidence(evidence: Mapping[str, Any]) -> str:
    if not evidence:
        return '<p class="quiet">The check counts exactly; it has no measured values beside its message.</p>'
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td class="number">{escaped(_value(value))}</td></tr>'
        for name, value in evidence.items()
    )
    head = '<thead><tr><th>measured, and held against</th><th class="number">value</th></tr></thead>'
    return f'<table class="evidence">{head}<tbody>{rows}</tbody></table>'


def _value(value: Any) -> str:
    shown = finite(value)
    return str(value) if shown is None or isinstance(value, int) else f"{shown:.4g}"


def _time_lost(diagnosis: Mapping[str, Any]) -> str:
    hours = finite(diagnosis.get("hours_lost"))
    if hours is None:
        return '<p class="quiet">Unknown: the log does not say when things happened.</p>'
    passed = diagnosis.get("passed_update")
    since = "the start of the run" if passed is None else f"update {passed}, where it last passed"
    times = diagnosis.get("times") or 1
    again = f" It was found {times} times." if times > 1 else ""
    return (
        f"<p><b>{number(hours)} h</b> ({duration(hours * 3600)}): from {escaped(since)}, to its detection at update "
        f"{escaped(diagnosis.get('update', ''))}.{again}</p>"
    )


def checks_section(checks: Sequence[Check]) -> str:
    """Every check: failed, passed, and without power with what would decide."""
    failed, passed, silent = by_outcome(checks)
    return "".join(
        [
            _table("Failed", "bad", failed, lambda check: str(check.get("message", ""))) if failed else "",
            _table("Passed", "good", passed, _why_silent),
            _table("Could not tell (no power)", "note", silent, lambda check: str(check.get("silence", ""))),
        ]
    )


def _why_silent(check: Check) -> str:
    return f"Could not tell {check.get('no_power')} times: {check.get('silence', '')}" if check.get("no_power") else ""


def _table(title: str, kind: str, checks: Sequence[Check], say: Any) -> str:
    heading = f'<h3 class="{kind}">{escaped(title)} <span class="count">{len(checks)}</span></h3>'
    if not checks:
        return f'{heading}<p class="quiet">None.</p>'
    rows = "".join(
        f'<tr><th scope="row">{escaped(check.get("check", ""))}</th>'
        f'<td class="number">{_times(check)}</td><td class="number">{_span(check)}</td>'
        f"<td>{escaped(say(check))}{_now(check)}</td></tr>"
        for check in checks
    )
    return (
        f'{heading}<div class="wide"><table><thead><tr><th>check</th><th class="number">passed / failed / no power</th>'
        f'<th class="number">updates</th><th>what it said</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _times(check: Check) -> str:
    return " / ".join(escaped(check.get(key, 0)) for key in ("passed", "failed", "no_power"))


def _span(check: Check) -> str:
    first, last = check.get("first_update", ""), check.get("last_update", "")
    return escaped(first if first == last else f"{first}–{last}")


def _now(check: Check) -> str:
    status = check.get("status")
    return (
        f' <span class="quiet">Last: {escaped(_STATUS.get(str(status), status))}.</span>' if check.get("failed") else ""
    )

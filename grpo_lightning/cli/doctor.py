"""``doctor``: what was wrong with a run, as a table, a page and an exit code."""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError

HEALTHY, FAILURE, UNSURE = 0, 1, 3
"""Exit codes. 1 is also a file that cannot be written, 2 a mistake in the arguments or a record that cannot be read, 3
warnings only, or nothing that could be judged."""

_WORDS = {"halt": "Failure", "warn": "Warning", "log": "Noted"}

_RESULTS = {"pass": "passed", "fail": "FAILED", "no power": "no power"}
_WIDTH = 76
"""Longest reason in the table."""


def main(command: str, args: list[str]) -> None:
    """Print what the doctor found in a run, write its page, and exit with a code that says how bad it is."""
    parser = argparse.ArgumentParser(
        "grpo-lightning doctor",
        description="Say what was wrong with a run: from the doctor's own record of it, from its metrics.csv if there "
        "is none, or from the log of another trainer. Exit code: 0 no failure, 1 a failure that halts, or a file "
        "that could not be written, 2 nothing could be read, 3 warnings only, or nothing could be judged.",
    )
    parser.add_argument("run", type=Path, nargs="?", help="folder of the run; doctor.html is written to it")
    parser.add_argument(
        "--trl",
        type=Path,
        metavar="LOG",
        help="log of another trainer instead: TRL's trainer_state.json, a folder with it, or a CSV file",
    )
    parser.add_argument(
        "--updates-per-rollout",
        type=int,
        metavar="N",
        help="optimizer steps on each rollout, where a log does not say: some checks need more than 1",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write doctor.json and doctor.html there")
    parser.add_argument("--json", action="store_true", help="print doctor.json instead of the table")
    given = parser.parse_args(args)
    if (given.run is None) == (given.trl is None):
        raise ConfigurationError("expected either the folder of a run or --trl LOG; see grpo-lightning doctor -h")
    if given.updates_per_rollout is not None and given.updates_per_rollout < 1:
        raise ConfigurationError(f"expected --updates-per-rollout of 1 or more, but got {given.updates_per_rollout}")
    record = _of_run(given.run, given.updates_per_rollout) if given.trl is None else _of_log(given.trl, given)
    page = _write(record, given.run, given.output)
    if given.json:
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        print("\n".join(summary(record, page)))
    raise SystemExit(exit_status(record))


def _of_run(run: Path, updates_per_rollout: int | None) -> dict[str, Any]:
    from grpo_lightning.diagnostics.foreign.log import read_log
    from grpo_lightning.diagnostics.foreign.record import foreign_record
    from grpo_lightning.diagnostics.report.files import FACTS, read_record

    if not run.is_dir():
        raise ConfigurationError(f"expected the folder of a run, but there is none at {run}")
    record = read_record(run)
    metrics = run / "metrics.csv"
    if record is not None:
        _tell_if_older(record, metrics)
        return record
    if not metrics.is_file():
        raise ConfigurationError(
            f"expected {FACTS} or metrics.csv in {run}, but there is neither; the doctor writes {FACTS} when a run "
            "ends, CSVLogger writes metrics.csv while it goes on"
        )
    facts = _stored_facts(run)
    return foreign_record(read_log(metrics), "metrics", updates_per_rollout=updates_per_rollout, facts=facts)


def _tell_if_older(record: Mapping[str, Any], metrics: Path) -> None:
    """A run that went on and was killed leaves the record of its earlier part."""
    from grpo_lightning.diagnostics.foreign.log import read_log

    if not metrics.is_file():
        return
    with contextlib.suppress(ConfigurationError):
        logged = int(max(step for step, _ in read_log(metrics).rows)) + 1
        if logged > record["run"]["updates"]:
            print(f"record of update {record['run']['updates']}; metrics.csv goes to {logged}", file=sys.stderr)


def _stored_facts(run: Path) -> dict[str, Any]:
    """What stored trajectories add to a log."""
    if not any((run / "trajectories").glob("epoch-*/log_ratios.parquet")):
        return {}
    import torch

    from grpo_lightning.diagnostics.log_ratios import LogRatioHistograms
    from grpo_lightning.trajectories.store import load_epoch, stored_epochs

    epochs = [load_epoch(path) for path in list(stored_epochs(run).values())[-2:]]
    found = [torch.from_numpy(epoch.log_ratios) for epoch in epochs if epoch.log_ratios is not None]
    if not found:
        return {}
    trained = found[-1][found[-1].isfinite()]
    histograms = LogRatioHistograms()
    histograms.add(trained, torch.zeros(len(trained), dtype=torch.int64))
    facts = histograms.facts()
    # What is stored does not say how many updates lay between.
    return {"sampling": {"log_ratio_histograms": {**facts, "by_k": {"all": facts["by_k"].get("0", [])}}}}


def _of_log(log: Path, given: argparse.Namespace) -> dict[str, Any]:
    from grpo_lightning.diagnostics.foreign.log import read_log
    from grpo_lightning.diagnostics.foreign.record import foreign_record

    source = "csv" if log.suffix == ".csv" else "trl"
    return foreign_record(read_log(log), source, updates_per_rollout=given.updates_per_rollout)


def _write(record: Mapping[str, Any], run: Path | None, output: Path | None) -> Path | None:
    """The page's path; none if there is nowhere to write it."""
    from grpo_lightning.diagnostics.report.files import PAGE, write_page, write_report

    if output is not None:
        if output.exists() and not output.is_dir():
            raise ConfigurationError(f"expected a folder to write to, but --output {output} is a file")
        write_report(output, record)
        return output / PAGE
    if run is None:
        return None
    # No record is made up for a run: it may be going on, and will leave its own.
    write_page(run, record)
    return run / PAGE


def exit_status(record: Mapping[str, Any]) -> int:
    """The command's exit code.

    Args:
        record: What ``doctor.json`` holds.
    """
    if diagnosis := record.get("diagnosis"):
        return {"halt": FAILURE, "warn": UNSURE}.get(diagnosis["reaction"], HEALTHY)
    return HEALTHY if any(check["passed"] for check in record["checks"]) else UNSURE


def summary(record: Mapping[str, Any], page: Path | None) -> list[str]:
    """The lines that are printed: what was found, every check, and where the page is.

    Args:
        record: What ``doctor.json`` holds.
        page: The page; None if none was written.
    """
    from grpo_lightning.diagnostics.beyond_a_log import BEYOND_A_LOG
    from grpo_lightning.diagnostics.report.verdict_sections import by_outcome

    failed, passed, silent = by_outcome(record["checks"])
    lines = []
    if diagnosis := record.get("diagnosis"):
        lines += [f"{_WORDS[diagnosis['reaction']]}: {diagnosis['title']}"]
        lines += [str(diagnosis["text"]).strip(), ""]
    elif not passed:
        lines.append(f"Nothing could be judged: no check failed, and none of {len(silent)} had the data to pass.")
    else:
        lines.append(f"No failure was found: {len(passed)} checks passed, {len(silent)} could not tell.")
    beyond = [check["check"] for check in silent if check["silence"].startswith(BEYOND_A_LOG)]
    lines += _table([*failed, *passed, *(check for check in silent if check["check"] not in beyond)])
    if beyond:
        lines.append(f"No power, because a log of scalars does not hold what they need: {', '.join(beyond)}.")
    where = "--output FOLDER writes it" if page is None else str(page)
    return [*lines, f"Report: {where}"]


def _table(checks: list[Mapping[str, Any]]) -> list[str]:
    rows = [("check", "result", "passed", "failed", "no power", "why")]
    for check in checks:
        outcome = "fail" if check["failed"] else check["status"]
        why = str(check["message"] if check["failed"] else check["silence"]).split("\n")[0]
        counts = (str(check[key]) for key in ("passed", "failed", "no_power"))
        rows.append(
            (check["check"], _RESULTS[outcome], *counts, why if len(why) <= _WIDTH else why[: _WIDTH - 1] + "…")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

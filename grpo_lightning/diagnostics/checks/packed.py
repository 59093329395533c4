"""The batches that training sees hold what the ledgers hold: exact comparisons by ledger row.

Shapes: ``N`` trained tokens, ``R`` ledger rows of the rollout.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.diagnostics.checks.tokens import LOGPROB_FIX, STATEMENTS, TOKEN_FIXES, replaced_logprobs
from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.rollout_table import RolloutTable
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.batch import PROMPT, PackedBatch
from grpo_lightning.rollout.ledger import Source

_NAME = "packed tokens"

_FIXES = {
    **TOKEN_FIXES,
    "old_replaced": LOGPROB_FIX,
    "advantages_wrong": "Pass the advantages of the groups on, one for each token of a turn, as they are.",
    "advantages_zero": "Pass the advantages of the groups on as they are.",
    "advantages_sign": "Pass the advantages of the groups on, with their sign.",
}

_STATEMENTS = {
    **STATEMENTS,
    "old_replaced": "have other old logprobs than the ledger",
    "shifted_logprobs": "have old logprobs that the ledger has for their neighbours",
    "stale_rollout": "name another policy version than the ledger",
    "retokenised": "have another id than the ledger",
    "context_changed": "are predicted from other tokens, or at other positions, than they were sampled from",
    "advantages_zero": "have the advantage 0, which is not their group's",
    "advantages_sign": "have their group's advantage with the other sign",
    "advantages_wrong": "have another advantage than their group gave their turn",
}


def check_packed(batches: Sequence[PackedBatch], table: RolloutTable) -> Verdict:
    """Ids, contexts, sources, logprobs, versions and advantages of all targets are those of their ledger rows.

    Args:
        batches: Micro-batches of this process, fillers included.
        table: The rollout.
    """
    passes = {id(batch.target_ids): batch for batch in batches}
    verdicts = [_check_batch(batch, table) for batch in passes.values()]
    failed = next((v for v in verdicts if v.status is Status.FAIL), None)
    tokens = sum(batch.num_targets for batch in passes.values())
    return failed or Verdict(_NAME, Status.PASS, evidence={"tokens": tokens})


def _check_batch(batch: PackedBatch, table: RolloutTable) -> Verdict:
    rows = batch.ledger_index.cpu().numpy()
    foreign = (rows < 0) | (rows >= len(table))
    if foreign.any():
        return _failed("foreign_tokens", foreign)
    checks: tuple[Callable[[], tuple[str, NDArray[np.bool_]]], ...] = (
        lambda: _sources(table.source[rows]),
        lambda: _sources(batch.source.cpu().numpy()),
        lambda: ("retokenised", batch.target_ids.cpu().numpy() != table.token_ids[rows]),
        lambda: ("context_changed", _context_differs(batch, rows, table)),
        lambda: _old_logprobs(batch, rows, table),
        lambda: ("stale_rollout", batch.policy_version.cpu().numpy() != table.policy_version[rows]),
        lambda: _advantages(batch.advantages.double().cpu().numpy(), batch.loss_weight.cpu().numpy(), rows, table),
    )
    for check in checks:
        cause, wrong = check()
        if wrong.any():
            return _failed(cause, wrong)
    return Verdict(_NAME, Status.PASS)


def _sources(source: NDArray[np.int8]) -> tuple[str, NDArray[np.bool_]]:
    wrong = source != Source.SAMPLED
    return ("forced_in_mask" if (source == Source.FORCED).any() else "environment_in_mask"), wrong


def _context_differs(batch: PackedBatch, rows: NDArray[np.int64], table: RolloutTable) -> NDArray[np.bool_]:
    """Which targets belong to a sequence whose inputs are not the ledger's, up to its last target.

    A target's ledger row and its position say where its sequence begins among the rows, and so the row of each input.
    """
    inputs, positions = batch.input_ids.cpu().numpy(), batch.position_ids.cpu().numpy()
    sequences, row_ids = batch.sequence_ids.cpu().numpy(), batch.row_ids.cpu().numpy()
    target_index, owner = batch.target_index.cpu().numpy(), batch.sequence_index.cpu().numpy()
    begins = rows - table.position[rows]
    misplaced = positions[target_index] != table.position[rows] - 1
    begin_of_sequence = np.zeros(int(owner.max(initial=-1)) + 1, dtype=np.int64)
    begin_of_sequence[owner] = begins
    begin_of_row = np.zeros(int(row_ids.max(initial=-1)) + 1, dtype=np.int64)
    begin_of_row[row_ids[target_index]] = begins
    own = np.where(sequences == PROMPT, begin_of_row[row_ids], begin_of_sequence[np.maximum(sequences, 0)])
    differs = inputs != table.token_ids[np.clip(own + positions, 0, len(table) - 1)]
    bad_rows = np.unique(row_ids[differs & (sequences == PROMPT)])
    bad_sequences = np.unique(sequences[differs & (sequences != PROMPT)])
    differing: NDArray[np.bool_] = misplaced | np.isin(owner, bad_sequences) | np.isin(row_ids[target_index], bad_rows)
    return differing


def _old_logprobs(batch: PackedBatch, rows: NDArray[np.int64], table: RolloutTable) -> tuple[str, NDArray[np.bool_]]:
    old, stored = batch.old_logprobs.cpu().numpy(), table.logprobs[rows].astype(np.float32)
    wrong = ~((old == stored) | (np.isnan(old) & np.isnan(stored)))
    if not wrong.any():
        return "", wrong
    rounded = old.astype(np.float64)
    cause = replaced_logprobs(rounded[wrong])
    shifted = any((old == np.roll(stored, lag)).mean() > 0.8 for lag in (-2, -1, 1, 2))
    return cause or ("shifted_logprobs" if shifted else "old_replaced"), wrong


def _advantages(
    used: NDArray[np.float64], weight: NDArray[np.floating], rows: NDArray[np.int64], table: RolloutTable
) -> tuple[str, NDArray[np.bool_]]:
    """Fillers have none; the rest is compared in float32, in which batches hold it."""
    given = table.advantages[rows].astype(np.float32).astype(np.float64)
    wrong = (weight > 0) & (used != given)
    if not wrong.any():
        return "", wrong
    real = weight > 0
    if (used[real] == 0).all():
        return "advantages_zero", wrong
    return ("advantages_sign" if (used[real] == -given[real]).all() else "advantages_wrong"), wrong


def check_used(evidence: MicroBatchEvidence, table: RolloutTable) -> Verdict:
    """What the loss used of an update's tokens is what the rollout has of them, whatever happened on the way.

    Args:
        evidence: The update's tokens, of all processes.
        table: The rollout.
    """
    name = "used tokens"
    rows = evidence.ledger_index.numpy()
    if not len(rows):
        return Verdict(name, Status.NO_POWER, "The update has no tokens.")
    foreign = (rows < 0) | (rows >= len(table))
    if foreign.any():
        return _failed("foreign_tokens", foreign, name)
    cause, wrong = _sources(table.source[rows])
    if not wrong.any():
        cause, wrong = _advantages(evidence.advantage.numpy(), evidence.loss_weight.numpy(), rows, table)
    return _failed(cause, wrong, name) if wrong.any() else Verdict(name, Status.PASS, evidence={"tokens": len(rows)})


def _failed(cause: str, wrong: NDArray[np.bool_], name: str = _NAME) -> Verdict:
    return Verdict(
        name,
        Status.FAIL,
        f"{int(wrong.sum())} of {len(wrong)} tokens in the loss {_STATEMENTS[cause]}.",
        _FIXES.get(cause, LOGPROB_FIX),
        {"tokens": len(wrong), "wrong": int(wrong.sum()), "allowed": 0},
        cause=cause,
    )

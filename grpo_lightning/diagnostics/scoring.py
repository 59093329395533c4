"""What the trainer says of tokens that the engine sampled, outside of training."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_lightning.policy import evaluating, unpack
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.packing import PackedSequence, Row, pack

if TYPE_CHECKING:
    from grpo_lightning.diagnostics.examination import Run
    from grpo_lightning.policy import Policy


def scored_batch(
    samples: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float,
    banned_token_ids: tuple[int, ...] = (),
) -> PackedBatch:
    """A packed batch of prompts with completions, to be scored; equal prompts that follow each other share a row.

    Args:
        samples: ``(prompt, completion)`` as token ids, neither empty. The batch's targets are all completions' tokens
            in this order, and its sequences are the samples.
        temperature: Temperature to score at.
        banned_token_ids: Tokens that could not be sampled.
    """
    rows: list[Row] = []
    first_row = 0
    for prompt, completion in samples:
        # Logprobs of sampled tokens must be there; nothing reads these.
        ledger = Ledger.of_prompt(prompt).extended(completion, Source.SAMPLED, 0, [0.0] * len(completion), 0)
        sequence = PackedSequence(ledger, first_row, (0.0,), 1.0)
        first_row += len(ledger)
        if rows and rows[-1].prompt_ids == tuple(prompt):
            rows[-1] = Row(rows[-1].prompt_ids, (*rows[-1].sequences, sequence))
        else:
            rows.append(Row(tuple(prompt), (sequence,)))
    return pack(rows, temperature, banned_token_ids)


def plain_logprobs(policy: "Policy", batch: PackedBatch, every: int = 1) -> Tensor:
    """What the policy's model says of a batch's targets, one sequence after the other (slow), float64 ``[N]``.

    Args:
        policy: The policy, in whatever mode and precision is set.
        batch: The tokens, on the policy's device.
        every: Score only every so many sequences, from the first on; the others' are 0.
    """
    ids, lengths, sequence, position = unpack(batch)
    said = torch.zeros(batch.num_targets, dtype=torch.float64)
    for line in range(0, len(ids), every):
        own, length = sequence == line, int(lengths[line])
        # Logits of a long prompt would take more memory than training does.
        first = int(position[own].min())
        line_ids = ids[line : line + 1, :length]
        logits = policy.causal_lm(input_ids=line_ids, use_cache=False, logits_to_keep=length - first).logits[0]
        scores = logits[position[own] - first].float() / batch.temperature
        scores[:, list(batch.banned_token_ids)] = -torch.inf
        logprobs = scores.log_softmax(-1).gather(1, batch.target_ids[own][:, None])
        said[own.cpu()] = logprobs.squeeze(1).double().cpu()
    return said


@contextlib.contextmanager
def quiet(run: "Run") -> Iterator[None]:
    """Within this context the policy computes in the Trainer's precision, without dropout and gradients."""
    with evaluating(run.module.policy), torch.no_grad(), run.trainer.precision_plugin.forward_context():
        yield

"""The packed batch that the trainer computes on.

Shapes: ``T`` input tokens, ``R`` rows (a shared prompt and its sequences), ``S`` sequences, ``N`` sampled tokens.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from grpo_lightning.errors import LedgerError
from grpo_lightning.rollout.ledger import Source

PROMPT = -1
"""`PackedBatch.sequence_ids` of prompt tokens."""


_PER_TOKEN = ("input_ids", "position_ids", "row_ids", "sequence_ids")
_PER_TARGET = (
    "target_ids",
    "target_index",
    "sequence_index",
    "old_logprobs",
    "advantages",
    "loss_weight",
    "marked",
    "proximal_logprobs",
    "focus",
    "policy_version",
    "turn",
    "source",
    "ledger_index",
)


class PackedBatch:
    """One micro-batch: rows laid end to end, each a prompt once and then its sequences, without padding.

    A sequence is what follows the prompt in one episode: what the policy sampled, and between its turns what the
    environment said and what was forced. Its tokens see the prompt of their row and their own earlier tokens. Its last
    token predicts nothing, so it is not among the inputs. Only sampled tokens are targets; they stand in row order.

    Attributes:
        input_ids: Tokens, int64 ``[T]``.
        position_ids: Position in the token's own sequence (restarts after the prompt), int64 ``[T]``.
        row_ids: Row of each token, int64 ``[T]``.
        sequence_ids: Sequence of each token within the batch, `PROMPT` for prompt tokens, int64 ``[T]``.
        target_ids: The sampled tokens, int64 ``[N]``.
        target_index: Index in ``T`` of the hidden state that predicts each, int64 ``[N]``.
        sequence_index: Sequence of each sampled token, int64 ``[N]``.
        old_logprobs: Log-probability stored when the token was sampled, float32 ``[N]``.
        advantages: Advantage of each sampled token, float32 ``[N]``.
        loss_weight: Weight in the loss of the whole optimizer step, float32 ``[N]``; 0 in fillers.
        marked: Tokens that the surrogate treats apart, chosen for the whole optimizer step, bool ``[N]``.
        proximal_logprobs: Log-probability of each token as the trainer computed it before the epoch, float32 ``[N]``;
            NaN if it did not.
        focus: Tokens that the surrogate is computed of; all but where high-entropy tokens alone are trained on,
            bool ``[N]``.
        policy_version: Version that sampled each token, int64 ``[N]``.
        turn: Turn of its episode that each sampled token belongs to, int64 ``[N]``.
        source: `Source` of each target as its ledger has it, int8 ``[N]``.
        ledger_index: Row of each target among all ledger rows of the rollout, int64 ``[N]``.
        temperature: Sampling temperature.
        banned_token_ids: Tokens that could not be sampled.
        index: Position of this micro-batch in the rollout; -1 if it belongs to none.
        first_of_rollout: Whether this is the first micro-batch computed after sampling.
    """

    input_ids: Tensor
    position_ids: Tensor
    row_ids: Tensor
    sequence_ids: Tensor
    target_ids: Tensor
    target_index: Tensor
    sequence_index: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_weight: Tensor
    marked: Tensor
    proximal_logprobs: Tensor
    focus: Tensor
    policy_version: Tensor
    turn: Tensor
    source: Tensor
    ledger_index: Tensor
    temperature: float
    banned_token_ids: tuple[int, ...]
    index: int
    first_of_rollout: bool

    # Not a dataclass: Lightning's bf16-true would rewrite the floating-point fields of one in bfloat16, and with
    # them the stored logprobs.
    def __init__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        row_ids: Tensor,
        sequence_ids: Tensor,
        target_ids: Tensor,
        target_index: Tensor,
        sequence_index: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        loss_weight: Tensor,
        marked: Tensor,
        proximal_logprobs: Tensor,
        focus: Tensor,
        policy_version: Tensor,
        turn: Tensor,
        source: Tensor,
        ledger_index: Tensor,
        temperature: float,
        banned_token_ids: tuple[int, ...] = (),
        index: int = -1,
        first_of_rollout: bool = False,
    ) -> None:
        fields = locals()
        del fields["self"]
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a packed batch cannot be changed; make another with replace({name}=...)")

    def replace(self, **changes: Any) -> Self:
        """The same batch with some fields replaced."""
        return type(self)(**{**self.__dict__, **changes})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with all tensors on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking), _PER_TOKEN + _PER_TARGET)

    def pin_memory(self) -> Self:
        """The same batch in pinned memory (called by data loaders that pin)."""
        return self._map(Tensor.pin_memory, _PER_TOKEN + _PER_TARGET)

    def _map(self, function: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> Self:
        return self.replace(**{name: function(self.__dict__[name]) for name in names})

    def require_sampled(self) -> None:
        """Refuse targets that the policy did not sample.

        Raises:
            LedgerError: Naming their sources.
        """
        foreign = self.source[self.source != Source.SAMPLED].tolist()
        if foreign:
            counts = Counter(Source(value).name.lower() for value in foreign)
            raise LedgerError(
                f"{len(foreign)} of {self.num_targets} tokens in the loss were not sampled by the policy: "
                f"{', '.join(f'{count} {name}' for name, count in counts.items())}. Training on them would teach the "
                "policy what it never chose; only tokens of source 'sampled' may be targets"
            )

    @property
    def num_tokens(self) -> int:
        """Input tokens ``T``."""
        return self.input_ids.shape[0]

    @property
    def num_targets(self) -> int:
        """Sampled tokens ``N``."""
        return self.target_ids.shape[0]

    def first_rows(self, max_tokens: int) -> Self:
        """The leading rows with at most ``max_tokens`` input tokens together, but at least one row.

        Its sampled tokens are the leading ones of this batch.
        """
        row_ends = torch.bincount(self.row_ids).cumsum(0)
        rows = max(1, int((row_ends <= max_tokens).sum()))
        tokens = slice(0, int(row_ends[rows - 1]))
        # Targets follow the order of rows, so those of the leading rows lead as well.
        targets = slice(0, int((self.row_ids[self.target_index] < rows).sum()))
        leading = self._map(lambda tensor: tensor[tokens], _PER_TOKEN)
        return leading._map(lambda tensor: tensor[targets], _PER_TARGET)

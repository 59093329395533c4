"""How far rounding alone moves log-probabilities, from the dtypes they are computed in."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from grpo_lightning.diagnostics.precision import adapter_dtype, engine_dtype

if TYPE_CHECKING:
    from grpo_lightning.diagnostics.examination import Run

NOISE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
"""Rounding noise of a logprob in nats, by the dtype of the forward pass. The demo model shows 0.05 in bfloat16 and 1e-5
in float32; float16 keeps three bits more than bfloat16."""

MIN_APART = 5e-5
"""RMS difference in nats of two programs with equal weights that is nothing unusual in any dtype. On a first rollout,
where the adapter is 0, it may be exactly 0 and grow to this later."""

_TF32 = ("high", "medium", "tf32")
"""With these the matrix units of GPUs multiply float32 with the 10 bits that float16 has."""

_PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16, "transformer-engine": torch.bfloat16}


def computed_in(dtype: torch.dtype, device: str, matmul: str) -> torch.dtype:
    """The dtype whose rounding a forward pass shows.

    Args:
        dtype: Dtype of the weights.
        device: Type of their device, such as ``"cuda"``.
        matmul: What ``torch.get_float32_matmul_precision`` or ``torch.backends.cuda.matmul.fp32_precision`` says.
    """
    coarse = dtype is torch.float32 and device == "cuda" and matmul in _TF32
    return torch.float16 if coarse else dtype


def rounding(run: "Run") -> float:
    """RMS difference in nats of trainer and engine to reckon with at least, in the coarsest dtype of both."""
    policy = run.module.policy
    trained = {id(p) for p in policy.trainable_parameters().values()} if policy.has_adapter else set()
    dtypes = {p.dtype for p in policy.causal_lm.parameters() if id(p) not in trained}
    dtypes.add(_PRECISIONS.get(str(run.trainer.precision).rsplit("-", 1)[0], torch.float32))
    if run.data is not None:
        dtypes |= {engine_dtype(run), adapter_dtype(run) or engine_dtype(run)}
    return max(MIN_APART, _noise(run, dtypes))


def forward_rounding(run: "Run") -> float:
    """Rounding noise in nats of a logprob of the trainer's own forward pass."""
    dtype = run.module.policy.causal_lm.get_output_embeddings().weight.dtype
    with run.trainer.precision_plugin.train_step_context():
        device = run.module.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    return _noise(run, [dtype])


def _noise(run: "Run", dtypes: Iterable[torch.dtype]) -> float:
    # Since torch 2.9 get_float32_matmul_precision() raises where TF32 was chosen through torch.backends.
    told = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    matmul = told or torch.get_float32_matmul_precision()
    device = run.module.device.type
    return max(NOISE.get(computed_in(dtype, device, matmul), NOISE[torch.bfloat16]) for dtype in dtypes)

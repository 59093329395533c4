"""Section ``gradients``: the whole LoRA gradient of both sides on the same tokens, weights and advantages."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.performance.stored import ROOT, save
from benchmarks.performance.trl.cases import LONG, SHORT, Case, smoke
from benchmarks.performance.trl.search import start
from benchmarks.performance.trl.sides import asked, cores, trl_python
from benchmarks.performance.turns import environment
from grpo_lightning import GRPOModule
from grpo_lightning.adapters import save_adapter
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.packing import PackedSequence, Row, pack

DTYPES = ("float32", "bfloat16")
_WEIGHT_SCALE = 0.02
"""Standard deviation of the adapter's second factor, which is 0 in a fresh one."""

_OLD_NOISE = 0.05
"""Standard deviation of current less old log-probabilities, in nats: few ratios reach the clips, none is 1."""


_MICRO_BATCH = 2
"""Completions of TRL's, few enough for float32 on long prompts. The gradient does not depend on it."""


def measure(size: str) -> dict[str, Any]:
    """Both cases in both dtypes.

    Args:
        size: ``"full"`` or ``"smoke"``.
    """
    from grpo_lightning.demo import prepare_model

    model = str(prepare_model())
    cases = [SHORT, LONG] if size == "full" else [smoke(SHORT), smoke(LONG)]
    return {"cases": {case.name: compared(case, model) for case in cases}}


def compared(case: Case, model: str) -> dict[str, Any]:
    """Gradients of a case.

    Args:
        case: Its sizes.
        model: Folder of the model.
    """
    from safetensors.torch import load_file

    spec = asked(case, model, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts, completions = sampled(spec, case)
        module = GRPOModule(model, dtype="float32")
        module.configure_model()
        randomise(module)
        save_adapter(module.policy, folder / "adapter")
        batch = old_and_advantages(module, pack(rows(prompts, completions, case), 1.0), case)
        ours = {"float32": gradient(module, batch)}
        module = GRPOModule(model, dtype="bfloat16", adapter=str(folder / "adapter"))
        module.configure_model()
        ours["bfloat16"] = gradient(module, batch)
        told = {
            **spec,
            "settings": asdict(replace(start(case, cores()), batch=_MICRO_BATCH)),
            "dtypes": DTYPES,
            "adapter": str(folder / "adapter"),
            "prompts": prompts,
            "completions": completions,
            "old_logprobs": batch.old_logprobs.view(case.completions, case.tokens).tolist(),
            "advantages": batch.advantages.view(case.completions, case.tokens)[:, 0].tolist(),
            "gradients": str(folder),
        }
        save(folder / "spec.json", told)
        command = [str(trl_python()), "-m", "benchmarks.performance.trl.their_gradients", str(folder / "spec.json")]
        subprocess.run(command, cwd=ROOT, env=environment(ROOT), check=True)
        theirs = {dtype: load_file(folder / f"{dtype}.safetensors") for dtype in DTYPES}
    return {
        "tokens": case.completions * case.tokens,
        "parameters": sum(tensor.numel() for tensor in ours["float32"].values()),
        "between": {dtype: alike(ours[dtype], theirs[dtype]) for dtype in DTYPES},
        "rounding": {
            name: alike(side["bfloat16"], side["float32"]) for name, side in (("trl", theirs), ("ours", ours))
        },
    }


def sampled(spec: Mapping[str, Any], case: Case) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts, and what the base model says to them, by transformers.

    Args:
        spec: What `asked` returned.
        case: The sizes.

    Returns:
        Token ids ``[P]`` of prompts, and ``[P][G]`` of completions.
    """
    from transformers import AutoModelForCausalLM

    from grpo_lightning.rollout.prompts import PromptEncoder

    encoder = PromptEncoder(spec["model"], 4096)
    prompts = [encoder.first(task["messages"]) for task in spec["tasks"]]
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16)
    completions = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        for prompt in prompts:
            ids = torch.tensor([prompt])
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=case.tokens,
                max_new_tokens=case.tokens,
                num_return_sequences=case.samples,
            )
            completions.append(found[:, len(prompt) :].tolist())
    return prompts, completions


def rows(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], case: Case) -> list[Row]:
    """The tokens on their way into a batch, weighted as one optimizer step of equal lengths."""
    made = []
    for prompt, answers in zip(prompts, completions, strict=True):
        begun = Ledger.of_prompt(prompt)
        ledgers = [begun.extended(ids, Source.SAMPLED, 0, [0.0] * len(ids), 0) for ids in answers]
        weight = 1 / (case.completions * case.tokens)
        made.append(Row(tuple(prompt), tuple(PackedSequence(ledger, 0, (0.0,), weight) for ledger in ledgers)))
    return made


def randomise(module: GRPOModule) -> None:
    """Give the adapter weights under which all of it has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.policy.trainable_parameters().items():
            scale = _WEIGHT_SCALE if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def old_and_advantages(module: GRPOModule, batch: PackedBatch, case: Case) -> PackedBatch:
    """The batch with old log-probabilities near the module's, and random advantages of the sequences."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        current = module.policy.token_logprobs(batch).logprobs
    noise = _OLD_NOISE * torch.randn(current.shape, generator=generator)
    advantages = torch.randn(case.completions, generator=generator)
    return batch.replace(old_logprobs=current + noise, advantages=advantages[batch.sequence_index])


def gradient(module: GRPOModule, batch: PackedBatch) -> dict[str, Tensor]:
    """The adapter's gradient, by name."""
    loss, _ = module.batch_loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, parameter in module.policy.trainable_parameters().items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine of two gradients, the first one's length over the other's, and the length of their difference over it.

    Args:
        one: Tensors by name.
        other: The same names.

    Raises:
        ValueError: If the names differ.
    """
    if one.keys() != other.keys():
        raise ValueError(f"expected the same parameters, but these are on one side only: {one.keys() ^ other.keys()}")
    a, b = (torch.cat([side[name].double().flatten() for name in sorted(one)]) for side in (one, other))
    return {
        "cosine": float(a @ b / (a.norm() * b.norm())),
        "norm_ratio": float(a.norm() / b.norm()),
        "relative_difference": float((a - b).norm() / b.norm()),
    }


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """Smallest cosine in each dtype."""
    cases = result["cases"].values()
    return {f"gradient_cosine_{dtype}": min(case["between"][dtype]["cosine"] for case in cases) for dtype in DTYPES}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: between the sides, and what rounding does within each."""
    lines = [
        "| Case | Compared | cosine | ratio of lengths | length of the difference |",
        "|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        named = {f"here and TRL, {dtype}": case["between"][dtype] for dtype in DTYPES}
        labels = {"trl": "TRL", "ours": "here"}
        named |= {f"bfloat16 and float32, {labels[side]}": case["rounding"][side] for side in ("trl", "ours")}
        for number, (what, found) in enumerate(named.items()):
            lines.append(
                f"| {name if number == 0 else ''} | {what} | {found['cosine']:.6f} | {found['norm_ratio']:.4f} | "
                f"{found['relative_difference']:.1e} |"
            )
    return "\n".join(lines)

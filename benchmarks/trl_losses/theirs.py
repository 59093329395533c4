"""What TRL computes: its own code, from the rewards to the loss, on stored tensors instead of a model's.

Runs in the environment of TRL: reads cases as JSON from standard input and writes the results to standard output.
"""

import importlib
import json
import sys
import warnings
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import trl
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState

from benchmarks.trl_losses.batch import SAMPLES, Batch

TRAINERS = {
    "GRPOTrainer": ("trl", "GRPOConfig"),
    "RLOOTrainer": ("trl", "RLOOConfig"),
    "GMPOTrainer": ("trl.experimental.gmpo", "GMPOConfig"),
}
"""Where each trainer is, and its configuration."""

MAX_TOKENS = 10
PADDING = 0


class Named(nn.Identity):
    """A model that is nothing but the name of its log-probabilities."""

    is_gradient_checkpointing = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Tables:
    """Log-probabilities and entropies by the identifier of the token, which no two tokens share."""

    def __init__(self, batch: Batch, *, fresh: bool) -> None:
        current = batch.old if fresh else batch.logprobs
        self.current = torch.tensor(current, dtype=torch.float64, requires_grad=True)
        self.entropy = torch.tensor(batch.entropy, dtype=torch.float64, requires_grad=True)
        self.known = {
            "current": self.current,
            "old": torch.tensor(batch.old, dtype=torch.float64),
            "reference": torch.tensor(batch.reference, dtype=torch.float64),
        }

    def __call__(
        self,
        model: Named,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """In place of ``_get_per_token_logps_and_entropies``."""
        ids = input_ids[:, -logits_to_keep:]
        padding = torch.tensor([-0.7], dtype=torch.float64)
        logprobs = torch.cat([padding, self.known[model.name]])[ids]
        return logprobs, torch.cat([-padding, self.entropy])[ids] if compute_entropy else None, None


def trainer_of(case: Mapping[str, Any], batch: Batch, tables: Tables, folder: str) -> Any:
    """A trainer with what its loss and its advantages read, as its ``__init__`` would set it."""
    place, config = TRAINERS[case["trainer"]]
    module = importlib.import_module(place)
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "num_generations": SAMPLES} | case["trl"]
    steps = settings.get("steps_per_generation", settings.get("gradient_accumulation_steps", 1))
    args = getattr(module, config)(
        output_dir=folder,
        max_completion_length=MAX_TOKENS,
        per_device_train_batch_size=len(batch.lengths) // steps,
        reward_weights=list(batch.reward_weights),
        **settings,
    )
    trainer = object.__new__(getattr(module, case["trainer"]))
    for name, value in vars(args).items():
        if not hasattr(type(trainer), name):
            setattr(trainer, name, value)
    trainer.args, trainer.accelerator, trainer.state = args, Accelerator(cpu=True), TrainerState()
    trainer.model, trainer.ref_model = Named("old").train(), Named("reference")
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer._entropy_bonus_enabled = getattr(args, "entropy_coef", 0.0) != 0
    trainer.reward_weights = torch.tensor(batch.reward_weights, dtype=torch.float64)
    trainer._tokenizer = SimpleNamespace(pad_token_id=PADDING)
    trainer.environment_factories = trainer.environments = trainer.tools = trainer._buffered_inputs = None
    trainer.aux_loss_enabled = trainer._is_vlm = False
    trainer._step = 0
    trainer._metrics = {"train": defaultdict(list)}
    trainer._logs = defaultdict(deque, rewards=defaultdict(list), extra=defaultdict(list))
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    trainer._get_per_token_logps_and_entropies = tables
    return trainer


def generated(trainer: Any, case: Mapping[str, Any], batch: Batch) -> None:
    """Put the stored answers and rewards in the place of a model's and of reward functions'."""
    ids = [[PADDING + 1 + token for token in range(*span)] for span in batch.spans()]
    trainer.eos_token_ids = [row[-1] for s, row in enumerate(ids) if s not in batch.truncated]
    prompts, texts = [[1]] * len(ids), [str(s) for s in range(len(ids))]

    def generate(_: Any) -> tuple[Any, ...]:
        if case["trainer"] == "RLOOTrainer":
            return prompts, ids, texts
        tools = [list(batch.acted[slice(*span)]) for span in batch.spans()] if case["tools"] else None
        sampling = [list(batch.sampling[slice(*span)]) for span in batch.spans()] if trainer.use_vllm else None
        return prompts, ids, tools, texts, sampling, {}, None, [None] * len(ids)

    def reward(part: int) -> Any:
        def judge(completions: Sequence[str], **others: Any) -> list[float | None]:
            judged = [batch.rewards[int(text)][part] * case["reward_scale"] for text in completions]
            return [None if s in case["unscorable"] else value for s, value in enumerate(judged)]

        return judge

    trainer._generate = generate
    trainer.reward_funcs = [reward(part) for part in range(len(batch.reward_weights))]
    trainer.reward_func_names = [f"reward_{part}" for part in range(len(batch.reward_weights))]
    trainer.reward_processing_classes = [None] * len(batch.reward_weights)


def computed(case: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Advantages of all answers, and loss and gradients of the first optimizer step."""
    tables = Tables(batch, fresh=case["fresh"])
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        trainer = trainer_of(case, batch, tables, folder)
    generated(trainer, case, batch)
    loss, answers = 0.0, []
    starts = [begin for begin, _ in batch.spans()]
    for _ in range(trainer.args.gradient_accumulation_steps):
        inputs = trainer._prepare_inputs([{"prompt": "p"} for _ in batch.lengths])
        answers += [starts.index(token - PADDING - 1) for token in inputs["completion_ids"][:, 0].tolist()]
        part = trainer._compute_loss(Named("current"), inputs)
        part.backward()
        loss += part.item()
        trainer._step += 1
    return {
        "loss": loss,
        "gradient": tables.current.grad.tolist(),
        "entropy_gradient": None if tables.entropy.grad is None else tables.entropy.grad.tolist(),
        "advantages": list(trainer._logs["advantages"]),
        "answers": sorted(answers),
    }


def main() -> None:
    """Compute the cases on standard input."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    batch = Batch.stored()
    with redirect_stdout(sys.stderr):
        found = {case["name"]: computed(case, batch) for case in json.load(sys.stdin)}
    json.dump({"versions": {"trl": trl.__version__, "torch": torch.__version__}, "found": found}, sys.stdout)


if __name__ == "__main__":
    main()

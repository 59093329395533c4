"""What is compared: TRL's settings, those of this project that mean the same, and where there are none, why."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.trl_losses.batch import LENGTHS, SAMPLES

TOLERANCE = 1e-5
"""Largest relative difference of what counts as equal."""

Follows = Literal["", "TRL", "here", "open"]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: What is compared.
        trl: Settings of TRL's configuration.
        here: Settings of `GRPOModule` and `RolloutDataModule`; what is left out has the default of the functions.
        trainer: TRL's trainer.
        compares: ``"loss"``, with its gradient, or ``"advantages"``.
        fresh: Whether the policy is still the one that the trainer started the epoch with.
        tools: Whether tools wrote some of the tokens.
        unscorable: Answers without a reward.
        reward_scale: Factor of the rewards.
        advantage_scale: Factor of this project's advantages, where none of its settings is one.
        difference: Why the results differ; empty where they must be equal.
        follows: Whose result is that of the method's paper, where they differ; ``"open"`` where it does not say.
        note: What else there is to say, such as how a setting was converted.
    """

    name: str
    trl: Mapping[str, Any]
    here: Mapping[str, Any] = field(default_factory=dict)
    trainer: str = "GRPOTrainer"
    compares: Literal["loss", "advantages"] = "loss"
    fresh: bool = False
    tools: bool = False
    unscorable: tuple[int, ...] = ()
    reward_scale: float = 1.0
    advantage_scale: float = 1.0
    difference: str = ""
    follows: Follows = ""
    note: str = ""

    def request(self) -> dict[str, Any]:
        """What the process with TRL is told."""
        usual = {"beta": 0.0, "num_iterations": 1 if self.fresh else 2}
        if self.trainer != "RLOOTrainer":
            usual["scale_rewards"] = "none"
        names = ("name", "trainer", "fresh", "tools", "unscorable", "reward_scale")
        return {name: getattr(self, name) for name in names} | {"trl": usual | dict(self.trl)}


def _vllm(mode: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    names = ("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max")
    return {"use_vllm": True, **dict(zip(names, (mode, low, high), strict=True))}


GRPO, DAPO = {"loss_type": "grpo"}, {"loss_type": "dapo"}
TOKEN: dict[str, Any] = {"aggregation": "token"}
KL = {"beta": 0.1, "use_bias_correction_kl": False}
GSPO = {"importance_sampling_level": "sequence"}
NARROW = {"epsilon": 0.05, "epsilon_high": 0.06}
NARROW_HERE = {"clip_low": 0.05, "clip_high": 0.06}
TWO = {"gradient_accumulation_steps": 2}
OFF_POLICY = {"use_vllm": True, "vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.2}
REJECT = {"correction": "reject_k1", "correction_args": {"threshold": 0.2}}
GROUP = math.sqrt((SAMPLES - 1) / SAMPLES)
BATCH = math.sqrt((len(LENGTHS) - 1) / len(LENGTHS))
GMPO = {"epsilon": 0.2, "epsilon_high": 0.3}
GMPO_HERE = {"surrogate": "gmpo", "clip_low": 0.2, "clip_high": 0.3}

SURROGATES = [
    Case("GRPO", GRPO),
    Case("DAPO, before the first update", DAPO, TOKEN, fresh=True),
    Case("BNPO", {"loss_type": "bnpo"}, TOKEN, note="one micro-batch"),
    Case("Dr. GRPO", {"loss_type": "dr_grpo"}, {"aggregation": "constant", "aggregation_length": 10}),
    Case("DAPO", DAPO | {"epsilon_high": 0.28}, TOKEN | {"clip_high": 0.28}),
    Case("two-sided clip", GRPO | {"delta": 1.25}, {"surrogate_args": {"delta": 1.25}}),
    Case(
        "LUSPO",
        {"loss_type": "luspo"} | GSPO | NARROW,
        {"ratio_level": "sequence", "aggregation": "sequence_sum"} | NARROW_HERE,
    ),
    Case("LUSPO, token ratios", {"loss_type": "luspo"}, {"aggregation": "sequence_sum"}),
    Case("SAPO", {"loss_type": "sapo"}, {"surrogate": "sapo"}),
    Case(
        "SAPO, other temperatures",
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
        {"surrogate": "sapo", "surrogate_args": {"tau_positive": 2.0, "tau_negative": 3.0}},
    ),
    Case(
        "CISPO",
        {"loss_type": "cispo", "epsilon_high": 1.25},
        TOKEN | {"surrogate": "cispo", "clip_high": 0.25},
        note="`clip_high` is `epsilon_high - 1`: TRL gives the cap itself",
    ),
    Case(
        "CISPO, settings of the same name",
        {"loss_type": "cispo", "epsilon_high": 1.25},
        TOKEN | {"surrogate": "cispo", "clip_high": 1.25},
        difference="`epsilon_high` is the cap of the ratio, `clip_high` its distance from 1",
        follows="here",
    ),
    Case("VESPO", {"loss_type": "vespo"}, TOKEN | {"surrogate": "vespo", "ratio_level": "sequence_product"}),
    Case("GMPO", GMPO, GMPO_HERE, trainer="GMPOTrainer"),
    Case("GMPO, KL", GMPO | {**KL}, GMPO_HERE | {"kl_coef": 0.1}, trainer="GMPOTrainer"),
    Case(
        "RLOO",
        {"normalize_advantages": False},
        {"advantage": "leave_one_out", "ratio_level": "sequence_product"},
        trainer="RLOOTrainer",
        note="the ratio is that of the whole sequence, clipped",
    ),
]

LEVELS = [
    Case("GSPO", GRPO | GSPO | NARROW, {"ratio_level": "sequence"} | NARROW_HERE),
    Case(
        "GSPO by token gradients",
        GRPO | GSPO | NARROW,
        {"ratio_level": "sequence_token"} | NARROW_HERE,
        note="TRL has no `sequence_token` any more; with one advantage per answer it is the same",
    ),
    Case("GSPO, token mean", DAPO | GSPO | NARROW, TOKEN | {"ratio_level": "sequence"} | NARROW_HERE),
    Case(
        "GSPO, constant",
        {"loss_type": "dr_grpo"} | GSPO | NARROW,
        {"ratio_level": "sequence", "aggregation": "constant", "aggregation_length": 10} | NARROW_HERE,
    ),
    Case(
        "GSPO, two-sided",
        GRPO | GSPO | NARROW | {"delta": 1.07},
        {"ratio_level": "sequence"} | NARROW_HERE | {"surrogate_args": {"delta": 1.07}},
    ),
    Case("SAPO, sequence ratios", {"loss_type": "sapo"} | GSPO, {"surrogate": "sapo", "ratio_level": "sequence"}),
    Case(
        "CISPO, sequence ratios",
        {"loss_type": "cispo", "epsilon_high": 1.05} | GSPO,
        TOKEN | {"surrogate": "cispo", "clip_high": 0.05, "ratio_level": "sequence"},
    ),
]

PENALTIES = [
    Case("KL", GRPO | {**KL}, {"kl_coef": 0.1}),
    Case("KL, token mean", DAPO | {**KL}, TOKEN | {"kl_coef": 0.1}),
    Case("KL, sequence ratios", GRPO | GSPO | {**KL}, {"ratio_level": "sequence", "kl_coef": 0.1}),
    Case(
        "KL times the ratio, as TRL has it by default",
        DAPO | {"beta": 0.1},
        TOKEN | {"kl_coef": 0.1, "kl_estimator": "k2"},
        difference="not offered; the gradient of `k2` is the same but for a factor, the ratio",
        follows="open",
        note="DeepSeek-V3.2, equation 7, has the ratio, GRPO has not",
    ),
    Case(
        "KL times the ratio, before the first update",
        DAPO | {"beta": 0.1},
        TOKEN | {"kl_coef": 0.1, "kl_estimator": "k2"},
        fresh=True,
        difference="the value is that of `k3`; the gradient is that of `k2`, since that of the ratio adds to it",
        follows="open",
    ),
    Case(
        "KL times the ratio, settings of the same name",
        GRPO | {"beta": 0.1},
        {"kl_coef": 0.1},
        difference="TRL multiplies k3 by the ratio unless `use_bias_correction_kl=False`",
        follows="here",
        note="GRPO, equation 4",
    ),
    Case("entropy bonus", DAPO | {"entropy_coef": 0.02}, TOKEN | {"entropy_coef": 0.02}),
    Case(
        "entropy bonus, answers of equal weight",
        GRPO | {"entropy_coef": 0.02},
        {"entropy_coef": 0.02},
        difference="TRL takes the mean over tokens whatever the loss is; here it is aggregated as the loss is",
        follows="open",
    ),
    Case("high-entropy tokens", DAPO | {"top_entropy_quantile": 0.25}, TOKEN | {"entropy_share": 0.25}),
    Case(
        "high-entropy tokens, KL",
        GRPO | {"top_entropy_quantile": 0.25, **KL},
        {"entropy_share": 0.25, "kl_coef": 0.1},
        note="the KL is of all tokens in both",
    ),
    Case(
        "high-entropy tokens, SAPO",
        {"loss_type": "sapo", "top_entropy_quantile": 0.6},
        {"surrogate": "sapo", "entropy_share": 0.6},
    ),
    Case(
        "high-entropy tokens, two micro-batches",
        DAPO | TWO | {"top_entropy_quantile": 0.4},
        TOKEN | {"entropy_share": 0.4},
        difference="TRL takes the quantile of each micro-batch, here it is that of the optimizer step",
        follows="open",
    ),
    Case(
        "high-entropy tokens, entropy bonus",
        DAPO | {"top_entropy_quantile": 0.25, "entropy_coef": 0.02},
        TOKEN | {"entropy_share": 0.25, "entropy_coef": 0.02},
        difference="TRL's bonus is the mean over the tokens of high entropy, here that over all",
        follows="open",
    ),
    Case(
        "high-entropy tokens, GMPO",
        GMPO | {"top_entropy_quantile": 0.6},
        GMPO_HERE | {"entropy_share": 0.6},
        trainer="GMPOTrainer",
        difference="TRL takes the geometric mean over these tokens alone; here it is over all, and these tokens' "
        "share of it counts",
        follows="open",
    ),
]

CORRECTIONS = [
    Case(
        "engine, TRL's defaults",
        {"use_vllm": True, "scale_rewards": "group"},
        TOKEN
        | {"correction": "mis_sequence", "correction_args": {"low": 0.0, "high": 3.0}}
        | {"advantage": "group_std", "advantage_args": {"std_floor": 1e-4 * GROUP}},
        advantage_scale=GROUP,
        note="advantages converted as below",
    ),
    Case(
        "engine, token_truncate",
        GRPO | _vllm("token_truncate", high=1.2),
        {"correction": "tis_token", "correction_args": {"cap": 1.2}},
    ),
    Case(
        "engine, token_mask",
        GRPO | _vllm("token_mask", 0.8, 1.3),
        {"correction": "mis_token", "correction_args": {"low": 0.8, "high": 1.3}},
    ),
    Case(
        "engine, token_mask without lower bound",
        DAPO | _vllm("token_mask", high=1.3),
        TOKEN | {"correction": "mis_token", "correction_args": {"low": 0.0, "high": 1.3}},
    ),
    Case(
        "engine, sequence_truncate",
        GRPO | _vllm("sequence_truncate", high=1.5),
        {"correction": "tis_sequence", "correction_args": {"cap": 1.5}},
    ),
    Case(
        "engine, sequence_mask",
        DAPO | _vllm("sequence_mask", 0.6, 1.5),
        TOKEN | {"correction": "mis_sequence", "correction_args": {"low": 0.6, "high": 1.5}},
    ),
    Case(
        "engine, GSPO and sequence_mask",
        GRPO | GSPO | NARROW | _vllm("sequence_mask", 0.6, 1.5),
        {"ratio_level": "sequence", "correction": "mis_sequence", "correction_args": {"low": 0.6, "high": 1.5}}
        | NARROW_HERE,
    ),
    Case(
        "engine, CISPO, KL and token_truncate",
        {"loss_type": "cispo", "epsilon_high": 1.25, **KL} | _vllm("token_truncate", high=1.2),
        TOKEN
        | {"surrogate": "cispo", "clip_high": 0.25, "kl_coef": 0.1}
        | {"correction": "tis_token", "correction_args": {"cap": 1.2}},
        note="the KL is not weighted in both",
    ),
    Case(
        "engine, token_truncate from both sides",
        GRPO | _vllm("token_truncate", 0.9, 1.2),
        {"correction": "tis_token", "correction_args": {"cap": 1.2}},
        difference="a lower bound of the weights is not offered; compared with the upper one alone",
        follows="here",
    ),
    Case(
        "off-policy mask, before the first update",
        GRPO | OFF_POLICY | {"off_policy_mask_threshold": 0.35},
        {"correction": "reject_k1", "correction_args": {"threshold": 0.35}},
        fresh=True,
        note="equal where all answers beyond the threshold are bad ones",
    ),
    Case(
        "off-policy mask",
        GRPO | OFF_POLICY,
        REJECT,
        difference="TRL measures from the engine to the current policy and drops bad answers alone; here it is to the "
        "policy before the first update, and answers of any advantage",
        follows="TRL",
    ),
]

WHOLE_STEP = [
    Case("GRPO, two micro-batches", GRPO | TWO),
    Case(
        "Dr. GRPO, two micro-batches",
        {"loss_type": "dr_grpo"} | TWO,
        {"aggregation": "constant", "aggregation_length": 10},
    ),
    Case("DAPO, two micro-batches", DAPO | TWO, TOKEN),
    Case("LUSPO, two micro-batches", {"loss_type": "luspo"} | TWO, {"aggregation": "sequence_sum"}),
    Case(
        "BNPO, two micro-batches",
        {"loss_type": "bnpo"} | TWO,
        TOKEN,
        difference="TRL takes the token mean of each micro-batch, here it is that of the optimizer step",
        follows="open",
        note="DAPO's token mean is that of the step",
    ),
    Case(
        "DAPO, two optimizer steps per rollout",
        DAPO | {"steps_per_generation": 2},
        TOKEN,
        difference="TRL divides by the rollout's tokens per optimizer step, here by those of the step itself",
        follows="open",
    ),
    Case("tools, GRPO", GRPO, tools=True, note="tokens of tools count neither in loss nor length"),
    Case("tools, DAPO, KL", DAPO | {**KL}, TOKEN | {"kl_coef": 0.1}, tools=True),
    Case("tools, GSPO", GRPO | GSPO | NARROW, {"ratio_level": "sequence"} | NARROW_HERE, tools=True),
    Case(
        "truncated answers masked, DAPO",
        DAPO | {"mask_truncated_completions": True},
        TOKEN,
        note="here `mask_truncated=True`",
    ),
    Case(
        "truncated answers masked, GRPO",
        GRPO | {"mask_truncated_completions": True},
        difference="TRL still counts them in the number of answers that it divides by; here they count in no mean",
        follows="open",
    ),
    Case(
        "an answer without reward, DAPO",
        DAPO,
        TOKEN,
        unscorable=(3,),
        difference="TRL counts its tokens in the denominator, here it is left out",
        follows="open",
    ),
    Case(
        "an answer without reward, GRPO",
        GRPO,
        unscorable=(3,),
        difference="TRL counts it in the number of answers, here it is left out",
        follows="open",
    ),
]

BY_SAMPLE_STD = "TRL's standard deviation divides by one less than the number of answers"
SMALLER = "`std_floor` and the advantages times the root of (n - 1) / n, which makes the standard deviations the same"


def _advantages(name: str, trl: Mapping[str, Any], advantage: str, floor: float | None = None, **more: Any) -> Case:
    arguments = {} if floor is None else {"advantage_args": {"std_floor": floor}}
    return Case(name, trl, {"advantage": advantage} | arguments, compares="advantages", **more)


GDPO = {"multi_objective_aggregation": "normalize_then_sum"}
NORMALISED = {"normalize_advantages": True}

ADVANTAGES = [
    _advantages("scale_rewards none", {"scale_rewards": "none"}, "group_mean"),
    _advantages(
        "scale_rewards none, an answer without reward",
        {"scale_rewards": "none"},
        "group_mean",
        unscorable=(3,),
    ),
    _advantages(
        "scale_rewards group", {"scale_rewards": "group"}, "group_std", difference=BY_SAMPLE_STD, follows="open"
    ),
    _advantages(
        "scale_rewards group, converted",
        {"scale_rewards": "group"},
        "group_std",
        1e-4 * GROUP,
        advantage_scale=GROUP,
        note=SMALLER,
    ),
    _advantages(
        "scale_rewards batch", {"scale_rewards": "batch"}, "batch_std", difference=BY_SAMPLE_STD, follows="open"
    ),
    _advantages(
        "scale_rewards batch, converted",
        {"scale_rewards": "batch"},
        "batch_std",
        1e-4 * BATCH,
        advantage_scale=BATCH,
        note=SMALLER,
    ),
    _advantages("GDPO", GDPO, "gdpo", difference=BY_SAMPLE_STD, follows="open"),
    _advantages(
        "GDPO, converted",
        GDPO,
        "gdpo",
        1e-4 * BATCH / GROUP,
        advantage_scale=BATCH,
        reward_scale=1024.0,
        note="rewards in the hundreds: GDPO adds the floor twice, and one `std_floor` can equal the second only",
    ),
    _advantages("leave-one-out", {"normalize_advantages": False}, "leave_one_out", trainer="RLOOTrainer"),
    _advantages(
        "leave-one-out, an answer without reward",
        {"normalize_advantages": False},
        "leave_one_out",
        trainer="RLOOTrainer",
        unscorable=(3,),
    ),
    _advantages(
        "leave-one-out, normalised",
        NORMALISED,
        "reinforce_pp_baseline",
        1e-4 * BATCH * (SAMPLES - 1) / SAMPLES,
        advantage_scale=BATCH,
        trainer="RLOOTrainer",
        note="`std_floor` also times (n - 1) / n of the group, the factor that leave-one-out brings",
    ),
]

SECTIONS = {
    "Losses": SURROGATES,
    "Ratio levels": LEVELS,
    "KL and entropy": PENALTIES,
    "Engine and trainer": CORRECTIONS,
    "What counts in a mean": WHOLE_STEP,
    "Advantages": ADVANTAGES,
}
"""All comparisons, as the table shows them."""

CASES = [case for cases in SECTIONS.values() for case in cases]

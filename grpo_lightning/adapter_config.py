"""What an adapter is: settings of ours or of an ``adapter_config.json``, checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from grpo_lightning.errors import CheckpointError, ConfigurationError

DEFAULT_RANK: Final = 16
DEFAULT_ALPHA: Final = 32.0
DEFAULT_TARGETS: Final = "all-linear"

AdapterConfig = Mapping[str, Any]
"""The fields of a PEFT ``LoraConfig``, as in ``adapter_config.json``."""

_UNSERVABLE = {
    "use_dora": "DoRA",
    "lora_bias": "biases in the adapter",
    "modules_to_save": "whole modules beside the adapter",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields that vLLM refuses when it loads the adapter, or does not know and would ignore."""

_SERVABLE_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""They set the adapter's first weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ) change the base model too."""

_DEFINING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Fields that, with the weights, say what the adapter computes."""


def check_servable(config: AdapterConfig, source: str) -> None:
    """Refuse what vLLM cannot serve: it says so only when it loads the adapter, or not at all.

    Args:
        config: The adapter's configuration.
        source: Where it comes from, for the message.

    Raises:
        ConfigurationError: Naming every field that is in the way.
    """
    if config.get("peft_type") != "LORA":
        raise ConfigurationError(f"expected a LoRA adapter in {source}, but got peft_type={config.get('peft_type')!r}")
    wrong = [f"{name}={config[name]!r} ({what})" for name, what in _UNSERVABLE.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias={config['bias']!r} (trained biases)")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _SERVABLE_INITIALISATIONS:
        wrong.append(f"init_lora_weights={start!r} (changes the base model's weights)")
    if wrong:
        raise ConfigurationError(
            f"expected a plain LoRA adapter, which vLLM can serve, but {source} has {', '.join(wrong)}. "
            "Convert it with PEFT (path_initial_model_for_weight_conversion), or merge it into the model and start a "
            "fresh adapter on that"
        )
    if not config.get("target_modules"):
        raise ConfigurationError(f"expected target_modules in {source}, the layers that have an adapter, but got none")
    for name, rank in {"r": config.get("r"), **(config.get("rank_pattern") or {})}.items():
        if not isinstance(rank, int) or rank < 1:
            raise ConfigurationError(f"expected a rank >= 1 in {source}, but got {name}={rank!r}")


def largest_rank(config: AdapterConfig) -> int:
    """The rank that an engine must have room for."""
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def fresh_config(*, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]) -> dict[str, Any]:
    """Configuration of a new adapter.

    Raises:
        ConfigurationError: If a value is out of range.
    """
    if rank < 1:
        raise ConfigurationError(f"expected lora_rank >= 1, but got {rank}")
    if not alpha > 0 or not 0 <= dropout < 1:
        raise ConfigurationError(f"expected lora_alpha > 0 and lora_dropout in [0, 1), but got {alpha} and {dropout}")
    if not targets:
        raise ConfigurationError("expected at least one name in lora_targets, but got none")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }


def continued_config(
    saved: AdapterConfig, source: str, *, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]
) -> dict[str, Any]:
    """Configuration of an adapter that training continues.

    Rank, alpha and targets are the saved ones. The dropout is a setting of the training, so it is ours.

    Args:
        saved: Content of its ``adapter_config.json``.
        source: Its folder, for messages.
        rank: ``lora_rank`` as given.
        alpha: ``lora_alpha`` as given.
        dropout: ``lora_dropout``.
        targets: ``lora_targets`` as given.

    Raises:
        ConfigurationError: If a given value is neither the default nor the saved one, or vLLM cannot serve it.
    """
    check_servable(saved, source)
    wrong = [
        f"{name}={given!r} (the adapter's is {own!r})"
        for name, given, default, own in (
            ("lora_rank", rank, DEFAULT_RANK, saved["r"]),
            ("lora_alpha", alpha, DEFAULT_ALPHA, saved.get("lora_alpha")),
            ("lora_targets", targets, DEFAULT_TARGETS, saved.get("target_modules")),
        )
        if given != default and _comparable(given) != _comparable(own)
    ]
    if wrong:
        raise ConfigurationError(
            f"expected rank, alpha and targets from the adapter in {source}, but got {', '.join(wrong)} beside it; "
            "leave them out"
        )
    return {
        **saved,
        "lora_dropout": dropout,
        # The weights are loaded: PEFT need not compute first ones.
        "init_lora_weights": True,
        "inference_mode": False,
    }


def check_same(saved: AdapterConfig, current: AdapterConfig) -> None:
    """Refuse a checkpoint whose weights would mean something else under the current settings.

    Raises:
        CheckpointError: Naming the first field that differs.
    """
    for name in _DEFINING:
        if (saved.get(name) or None) != (current.get(name) or None):
            raise CheckpointError(
                f"expected the checkpoint's adapter setting {name}={saved.get(name)!r}, but got {current.get(name)!r}: "
                "the same weights would mean another policy"
            )


def _comparable(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, type(None))) else set(value)

"""Faults on the adapter's way to the engine, and in what the engine makes of it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grpo_lightning.callbacks.lora_sync
from benchmarks.faults.fault import FIRST_SYNC, PRE_FLIGHT, Stage, fault, updates
from grpo_lightning.adapters import read_adapter_config, read_adapter_weights, write_adapter
from grpo_lightning.callbacks import LoRAWeightSync
from grpo_lightning.rollout.types import AdapterRef

Weights = dict[str, Tensor]
Config = dict[str, Any]


def _engine(stage: Stage) -> type:
    return type(stage.engine)


def _differ(right: tuple[Weights, Config], wrong: tuple[Weights, Config]) -> bool:
    return right[1] != wrong[1] or any(not torch.equal(w, wrong[0][name]) for name, w in right[0].items())


def _loads_changed(stage: Stage, change: Callable[[Weights, Config], tuple[Weights, Config]]) -> None:
    """The engine loads something else than what stands in the adapter's folder."""

    def make(load: Any) -> Any:
        def wrong(self: Any, ref: AdapterRef) -> None:
            path = stage.folder / f"changed-{ref.name}"
            right = read_adapter_weights(ref.path), read_adapter_config(ref.path)
            weights, config = change(*right)
            stage.note(_differ(right, (weights, config)))
            write_adapter(weights, config, path)
            load(self, replace(ref, path=path))

        return wrong

    stage.wrap(_engine(stage), "load_adapter", make)


def _saves_changed(stage: Stage, change: Callable[[Weights, Config], tuple[Weights, Config]]) -> None:
    """Something else than the policy's adapter is written when it is published."""

    def make(save: Any) -> Any:
        def wrong(policy: Any, directory: Path) -> None:
            save(policy, directory)
            right = read_adapter_weights(directory), read_adapter_config(directory)
            weights, config = change(*right)
            stage.note(_differ(right, (weights, config)))
            shutil.rmtree(directory)
            write_adapter(weights, config, directory)

        return wrong

    stage.wrap(grpo_lightning.callbacks.lora_sync, "save_adapter", make)


def _without(family: str) -> Callable[[Weights, Config], tuple[Weights, Config]]:
    def change(weights: Weights, config: Config) -> tuple[Weights, Config]:
        return {n: w * 0 if family in n and "lora_B" in n else w for n, w in weights.items()}, config

    return change


@fault("adapter_rounded", deadline=FIRST_SYNC)
def adapter_rounded(stage: Stage) -> None:
    """The adapter is written in bfloat16 when it is published."""
    _saves_changed(stage, lambda weights, config: ({n: w.bfloat16().float() for n, w in weights.items()}, config))


@fault("sync_noop", deadline=FIRST_SYNC)
def sync_noop(stage: Stage) -> None:
    """Only the first adapter is ever loaded; of later ones the engine notes the version alone."""
    first: list[AdapterRef] = []

    def make(load: Any) -> Any:
        def wrong(self: Any, ref: AdapterRef) -> None:
            if not first:
                load(self, ref)
                first.append(ref)
            self._current = replace(first[0], version=ref.version)

        return wrong

    stage.wrap(_engine(stage), "load_adapter", make)


@fault("sync_noop", deadline=FIRST_SYNC)
def sync_never_publishes(stage: Stage) -> None:
    """The callback publishes once, and never again."""

    def make(publish: Any) -> Any:
        def wrong(self: Any, module: Any, engine: Any) -> None:
            if module.policy_version == 0:
                publish(self, module, engine)

        return wrong

    stage.wrap(LoRAWeightSync, "publish", make)


@fault("sync_stale", deadline=FIRST_SYNC)
def sync_one_behind(stage: Stage) -> None:
    """The engine loads the adapter that was published before this one."""
    kept: list[Path] = []

    def make(load: Any) -> Any:
        def wrong(self: Any, ref: AdapterRef) -> None:
            copy = stage.folder / f"kept-{ref.name}"
            shutil.copytree(ref.path, copy)
            kept.append(copy)
            load(self, replace(ref, path=kept[max(0, len(kept) - 2)]))

        return wrong

    stage.wrap(_engine(stage), "load_adapter", make)


@fault("adapter_changed", deadline=FIRST_SYNC)
def buffer_not_swapped(stage: Stage) -> None:
    """A double buffer that is not swapped: each publication writes the weights of the one before."""
    kept: list[Weights] = []

    def change(weights: Weights, config: Config) -> tuple[Weights, Config]:
        kept.append(weights)
        return kept[max(0, len(kept) - 2)], config

    _saves_changed(stage, change)


@fault("adapter_changed", deadline=FIRST_SYNC)
def published_under_held_weights(stage: Stage) -> None:
    """The adapter is published while the reference's weights stand in the policy."""
    stage.module["kl_coef"] = 0.1
    start: Weights = {}

    def make(publish: Any) -> Any:
        def wrong(self: Any, module: Any, engine: Any) -> None:
            if not start:
                start.update({n: p.detach().clone() for n, p in module.policy.trainable_parameters().items()})
            with module.policy._holding(start):
                publish(self, module, engine)

        return wrong

    stage.wrap(LoRAWeightSync, "publish", make)


def _serves(stage: Stage, adapter: Callable[[Any, Any], Any]) -> None:
    """Requests use another adapter than they ask for."""

    def make_generate(generate: Any) -> Any:
        async def wrong(self: Any, *args: Any, **settings: Any) -> Any:
            wanted = settings.pop("adapter", self._current)
            ref = self._current if not isinstance(wanted, AdapterRef | None) else wanted
            result = await generate(self, *args, adapter=adapter(self, ref), **settings)
            return replace(result, policy_version=-1 if ref is None else ref.version)

        return wrong

    def make_score(score: Any) -> Any:
        async def wrong(self: Any, ids: Any, **settings: Any) -> Any:
            wanted = settings.pop("adapter", self._current)
            ref = self._current if not isinstance(wanted, AdapterRef | None) else wanted
            return await score(self, ids, adapter=adapter(self, ref), **settings)

        return wrong

    stage.wrap(_engine(stage), "generate", make_generate)
    stage.wrap(_engine(stage), "score", make_score)


@fault("adapter_ignored", deadline=PRE_FLIGHT)
def adapter_ignored(stage: Stage) -> None:
    """Requests do not name the adapter: the engine answers from the base model."""
    _serves(stage, lambda engine, ref: None)


@fault("adapter_partial", deadline=PRE_FLIGHT)
def adapter_partly_loaded(stage: Stage) -> None:
    """The engine drops one module family of the adapter: up_proj."""
    _loads_changed(stage, _without("up_proj"))


@fault("adapter_partial", deadline=PRE_FLIGHT)
def adapter_of_first_layers(stage: Stage) -> None:
    """The engine applies the adapter in the first half of the layers only."""

    def change(weights: Weights, config: Config) -> tuple[Weights, Config]:
        numbers = {n: int(n.split("layers.")[1].split(".")[0]) for n in weights}
        half = (max(numbers.values()) + 1) / 2
        return {n: w * 0 if numbers[n] >= half and "lora_B" in n else w for n, w in weights.items()}, config

    _loads_changed(stage, change)


@fault("adapter_changed", deadline=FIRST_SYNC)
def adapter_partly_published(stage: Stage) -> None:
    """A filter on names leaves the down_proj layers out of what is published."""
    _saves_changed(stage, _without("down_proj"))


@fault("adapter_scale", deadline=PRE_FLIGHT)
def adapter_scale(stage: Stage) -> None:
    """The engine reads the adapter's alpha as twice what it is."""
    _loads_changed(stage, lambda weights, config: (weights, {**config, "lora_alpha": 2 * config["lora_alpha"]}))


@fault("adapter_scale", deadline=PRE_FLIGHT)
def scale_published_wrong(stage: Stage) -> None:
    """The published configuration holds an alpha equal to the rank, a library's default."""
    _saves_changed(stage, lambda weights, config: (weights, {**config, "lora_alpha": config["r"]}))


@fault("adapter_scale", deadline=PRE_FLIGHT)
def trainer_scale(stage: Stage) -> None:
    """The trainer multiplies its adapter by half of what its configuration says."""
    from grpo_lightning.module import GRPOModule

    def make(configure: Any) -> Any:
        def wrong(self: GRPOModule) -> None:
            fresh = not hasattr(self, "policy")
            configure(self)
            stage.note(False)
            for layer in self.policy.model.modules() if fresh else ():
                if hasattr(layer, "scaling"):
                    scaling: Any = layer.scaling
                    if isinstance(scaling, dict):
                        scaling["default"] *= 0.5
                        stage.note(True)

        return wrong

    stage.wrap(GRPOModule, "configure_model", make)


@fault("prefix_cache_stale", deadline=updates(4), needs_vllm=True)
def prefix_cache_stale(stage: Stage) -> None:
    """New weights are loaded in place under the old name, path and id: cached prefixes are those of the old ones."""
    first: list[AdapterRef] = []

    def make(load: Any) -> Any:
        def wrong(self: Any, ref: AdapterRef) -> None:
            if not first:
                path = stage.folder / "in-place"
                shutil.copytree(ref.path, path)
                first.append(replace(ref, path=path))
                load(self, first[0])
                return
            shutil.rmtree(first[0].path)
            shutil.copytree(ref.path, first[0].path)
            self.run(_reload(self, first[0]))
            self._current = replace(first[0], version=ref.version)

        return wrong

    stage.wrap(_engine(stage), "load_adapter", make)


async def _reload(engine: Any, ref: AdapterRef) -> None:
    from vllm.lora.request import LoRARequest

    client = await engine._client()
    await client.add_lora(
        LoRARequest(lora_name=ref.name, lora_int_id=ref.id, lora_path=str(ref.path), load_inplace=True)
    )


@fault("merged_rounding", deadline=PRE_FLIGHT, engine="merged")
def bf16_merge_rounding(stage: Stage) -> None:
    """The engine adds the adapter to a bfloat16 copy of the base model instead of applying it beside it."""


@fault("base_changed", deadline=FIRST_SYNC, engine="bfloat16")
def merge_unmerge_drift(stage: Stage) -> None:
    """The adapter is merged into the bfloat16 base and taken out again at each publication."""
    stage.module["dtype"] = "bfloat16"

    def make(publish: Any) -> Any:
        def wrong(self: Any, module: Any, engine: Any) -> None:
            with torch.no_grad():
                module.policy.model.merge_adapter()
                module.policy.model.unmerge_adapter()
            publish(self, module, engine)

        return wrong

    stage.wrap(LoRAWeightSync, "publish", make)


@fault("base_differs", deadline=PRE_FLIGHT, engine="other base", needs_vllm=True)
def other_base(stage: Stage) -> None:
    """The engine was started from another checkpoint of the base model."""

"""The hook that vLLM calls in each of its processes (``vllm.general_plugins`` entry point).

It does nothing unless `VLLMEngine` asked for it in the environment of its engine process, so that other
uses of vLLM in the same Python environment are left alone.
"""

import os

ENABLE_ENV = "GRPO_LIGHTNING_ENGINE"
"""Set to the process id of the trainer in the environment of the engine's processes."""


def register() -> None:
    """Install what grpo-lightning needs inside a vLLM process that `VLLMEngine` started."""
    owner = os.environ.get(ENABLE_ENV)
    if owner is None or os.getpid() == int(owner):
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # The platform is asked for the class by name; there is no setting for it.
        type(current_platform).get_punica_wrapper = classmethod(
            lambda cls: "grpo_lightning.rollout.vllm_lora_cpu.GroupedPunicaWrapperCPU"
        )
        from grpo_lightning.freed_memory import keep_freed_memory
        from grpo_lightning.rollout.vllm_ops_cpu import install

        keep_freed_memory()
        install()

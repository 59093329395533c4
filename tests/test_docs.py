"""The documentation builds without a warning, is complete, and does what it says."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest
import yaml
from doc_blocks import DOCS, blocks, run_page
from lightning.pytorch import Trainer
from runs import MODEL, data, trainer

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import RatioDegeneracyDetector
from grpo_lightning.rollout.engine import RolloutEngine

ROOT = DOCS.parent
PACKAGES = ("", ".callbacks", ".diagnostics", ".envs", ".functional", ".loggers", ".metrics", ".rewards", ".tasks")
PUBLIC = [
    (f"grpo_lightning{package}", name)
    for package in PACKAGES
    for name in importlib.import_module(f"grpo_lightning{package}").__all__
]
TABLES = ("trainer.md", "errors.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.html")}


def test_no_page_loads_anything_from_elsewhere(site):
    for name, html in site.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', html)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', html)
        assert loaded
        assert not [address for address in loaded if "//" in address], name


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[".".join(public) for public in PUBLIC])
def test_every_public_name_is_in_the_reference(site, package, name):
    home = getattr(getattr(importlib.import_module(package), name), "__module__", "")
    ids = [f'id="{place}.{name}"' for place in (package, home)]
    pages = [html for path, html in site.items() if path.startswith("reference/")]
    assert any(i in html for i in ids for html in pages)


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[".".join(public) for public in PUBLIC])
def test_every_public_class_and_function_is_documented(package, name):
    thing = getattr(importlib.import_module(package), name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    assert thing.__doc__, "has no docstring"
    if inspect.isclass(thing) and "__init__" in vars(thing):
        for parameter in list(inspect.signature(thing).parameters.values()):
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                assert re.search(rf"^ +{parameter.name}: ", thing.__doc__, re.MULTILINE), parameter.name


def named_tests():
    return [
        (table, *reference.split("::"))
        for table in TABLES
        for reference in re.findall(r"`(tests/[\w/.]+(?:::\w+)+)`", (DOCS / table).read_text("utf-8"))
    ]


@pytest.mark.parametrize("table", TABLES)
def test_every_row_names_a_test(table):
    lines = (DOCS / table).read_text("utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("|") and not line.startswith("|---")]
    assert len(rows) > 20
    for *_, proof in rows:
        assert proof == "test |" or "::" in proof, proof


@pytest.mark.parametrize("named", named_tests(), ids="::".join)
def test_the_tests_that_tables_name_exist(named):
    _, file, *path = named
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    for name in path:
        (found,) = [n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name]
        body = found.body


@pytest.mark.parametrize("page", sorted(path.name for path in (DOCS / "howto").glob("*.md")))
def test_how_to_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(f"howto/{page}", tmp_path)


PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_yaml_exist(page):
    owners = {"trainer": Trainer, "model": GRPOModule, "data": RolloutDataModule}
    for block in blocks(page):
        if block.language == "yaml":
            for section, settings in yaml.safe_load(block.text).items():
                known = {*inspect.signature(owners[section]).parameters, "class_path", "init_args"}
                assert set(settings) <= known


@pytest.mark.slow
@pytest.mark.parametrize("page", ["tutorial.md", "lightning-user.md", "coming-from-trl.md"])
def test_pages_with_a_real_model_run(page, tmp_path, demo_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, tmp_path)


def test_a_lightning_users_script_is_short():
    (script,) = [block for block in blocks("lightning-user.md") if block.title == "train.py"]
    assert len(script.text.splitlines()) <= 40


def test_the_pages_engine_trains(tmp_path, tiny_model):
    names = {}
    source = next(block.text for block in blocks("howto/engines.md") if "class PlainEngine" in block.text)
    exec(source, names)
    engine = names["PlainEngine"]()
    assert isinstance(engine, RolloutEngine)
    # With the detector's own limits: its logprobs are the trainer's.
    detector = RatioDegeneracyDetector()
    run = trainer(tmp_path, callbacks=[detector])
    run.fit(GRPOModule(tiny_model, **MODEL), data(engine, updates_per_rollout=2, val_size=2))
    assert run.global_step == 4
    assert engine.policy_version == -1
    assert "mismatch" in [verdict.check for verdict in detector.verdicts]


def templates():
    """Every text in the sources; what is filled in is an ellipsis."""
    for path in [*ROOT.glob("grpo_lightning/**/*.py"), *ROOT.glob("callbacks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_shown_are_those_of_the_sources():
    texts = list(templates())
    rows = [line.split(" | ") for line in (DOCS / "errors.md").read_text("utf-8").splitlines() if " | `tests/" in line]
    assert len(rows) > 50
    for _, cell, _ in rows:
        message = re.match("`([^`]+)`", cell)[1]
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), message

"""The page of all algorithms is what the docstrings say, lacks none, and its example trains."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml
from doc_blocks import DOCS, blocks
from runs import MODEL, data, trainer

from docs.algorithms_page import BEGIN, BESIDE, END, FAMILIES, PAGE, linked, parts_of, peer_names, with_list
from grpo_lightning import GRPOModule, RolloutDataModule, TransformersEngine
from grpo_lightning.callbacks import RunDoctor
from grpo_lightning.cli import main
from grpo_lightning.functional import AGGREGATIONS, CORRECTIONS, ESTIMATORS, KL_ESTIMATORS, RATIO_LEVELS, SURROGATES
from grpo_lightning.functional.surrogates import MARKS
from grpo_lightning.objective import Objective

TEXT = PAGE.read_text(encoding="utf-8")
REGISTRIES = {
    "ratio_level": RATIO_LEVELS,
    "surrogate": SURROGATES,
    "advantage": ESTIMATORS,
    "aggregation": AGGREGATIONS,
    "kl_estimator": KL_ESTIMATORS,
    "correction": CORRECTIONS,
}
SINGLE = ("kl_target", "entropy_target", "entropy_share", "overlong_buffer", "max_kl")
FUNCTIONS = {setting: function for family in FAMILIES for setting, function in family.functions.items()}
BESIDES = {function.__name__: function for functions in BESIDE.values() for function in functions}
OWN = {"my_losses.py", "spo.yaml"}


def settings(*owners):
    return {name for owner in owners for name in inspect.signature(owner).parameters}


def section(heading):
    found = re.search(rf"^### `{re.escape(heading)}`\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert found, f"{heading} has no section"
    return found[1]


def test_the_list_is_what_the_docstrings_say():
    assert with_list(TEXT) == TEXT, "run: python -m docs.algorithms_page"


def test_everything_registered_is_there():
    registered = {f"{setting}: {name}" for setting, registry in REGISTRIES.items() for name in registry}
    assert set(FUNCTIONS) == registered | set(SINGLE)
    assert {marks.__name__ for marks in MARKS.values()} <= set(BESIDES)


@pytest.mark.parametrize(("name", "function"), [*FUNCTIONS.items(), *BESIDES.items()], ids=[*FUNCTIONS, *BESIDES])
def test_every_docstring_has_its_parts(name, function):
    parts = parts_of(function)
    assert parts.formula.strip()
    assert all(parts.labels[label].strip(" .") for label in ("Source", "Peers", "Use"))
    assert re.search(r"https?://|\d{4}$|^none known", parts.labels["Source"])
    assert peer_names(parts.labels["Peers"]) in ("none known", "TRL", "verl", "TRL, verl")


@pytest.mark.parametrize("heading", FUNCTIONS)
def test_every_section_shows_formula_source_peers_and_use(heading):
    shown = section(heading)
    assert shown.count("```text") == 1 + len(BESIDE.get(FUNCTIONS[heading], ()))
    assert all(f"- *{label}*: " in shown for label in ("Source", "Peers", "Use"))
    assert f"](#{heading.replace(': ', '-')}) | " in TEXT


@pytest.mark.parametrize("lost", ["Source: none known\n", "Peers: none known\n", "Use: never\n", "    A = r\n"])
def test_a_docstring_that_lacks_a_part_is_named(lost):
    def incomplete():
        pass

    whole = "What it is.\n\n    A = r\n\nSource: none known\nPeers: none known\nUse: never\n"
    incomplete.__doc__ = whole
    assert parts_of(incomplete).labels["Use"] == "never"
    incomplete.__doc__ = whole.replace(lost, "")
    part = lost.partition(":")[0] if ":" in lost else "formula"
    with pytest.raises(ValueError, match=rf"expected a docstring with {part}, but that of .*incomplete has none"):
        parts_of(incomplete)


def test_settings_and_their_defaults_are_shown():
    assert "| `k` | required | How many samples share one success" in section("advantage: pass_at_k")
    assert "| `delta` | `None` | " in section("surrogate: clipped")
    # Those of the marks are given in surrogate_args too.
    assert "| `share` | `0.0002` | " in section("surrogate: clip_cov")
    assert "keys_N" not in TEXT
    assert "terms" not in re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("A, eq. 1, https://a.b/c", "[A, eq. 1](https://a.b/c)"),
        ("A, https://a.b/c; B, https://d.e; more", "[A](https://a.b/c); [B](https://d.e); more"),
        ("A, https://a.b/c, and B, https://d.e", "[A](https://a.b/c), and [B](https://d.e)"),
        ("A, https://a.b/c, with 5", "[A](https://a.b/c), with 5"),
        ("a book, 1992", "a book, 1992"),
    ],
)
def test_addresses_become_links(source, expected):
    assert linked(source) == expected


def test_what_is_written_by_hand_is_kept():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_list(page).startswith(f"before\n{BEGIN}\n\n## Ratio levels\n")
    assert with_list(page).endswith(f"\n{END}\nafter\n")
    with pytest.raises(ValueError, match="expected the marks"):
        with_list(f"before\n{BEGIN}\nold")
    for mark in ("presets", "learning", "trl"):
        assert TEXT.index(f"<!-- {mark} -->") < TEXT.index(f"<!-- /{mark} -->") < TEXT.index(BEGIN)


def test_the_formula_is_that_of_the_objective():
    (formula,) = re.findall(r"^ {4,}(loss = .*)$", Objective.__doc__, flags=re.MULTILINE)
    assert f"```text\n{formula}\n```" in TEXT


def test_the_table_of_settings_is_right():
    table = TEXT[TEXT.index("| setting | what it names") : TEXT.index("## Presets")]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    of_data = named[named.index("advantage") :]
    assert set(of_data) <= settings(RolloutDataModule)
    assert set(named) - set(of_data) <= settings(GRPOModule)
    assert set(REGISTRIES) | set(SINGLE) <= set(named)


class TestAFunctionOfYourOwn:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        for block in blocks("algorithms.md"):
            if block.title in OWN:
                (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        assert {path.name for path in tmp_path.iterdir()} == OWN
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    def test_it_trains_under_the_doctor(self, folder, tiny_model):
        given = yaml.safe_load((folder / "spo.yaml").read_text())["model"]
        module = GRPOModule(tiny_model, **MODEL, **given)
        assert module.objective.surrogate.func.__name__ == "spo"
        assert module.objective.surrogate.keywords == {"width": 0.3}
        doctor = RunDoctor(report=False)
        run = trainer(folder, callbacks=[doctor])
        run.fit(module, data(TransformersEngine(dtype="float32"), inner_epochs=2))
        assert run.global_step == 4
        # Its gradient is computed a second time.
        assert [v.status.name for v in doctor.verdicts if v.check == "gradient"] == ["PASS"]

    def test_the_command_line_takes_it(self, folder, tiny_model):
        run = {
            "seed_everything": 1,
            "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
            "model": {"model": tiny_model, "dtype": "float32"},
            "data": {
                "tasks": {"class_path": "grpo_lightning.tasks.SumTasks"},
                "rewards": ["real.one_is_longer"],
                "engine": {"class_path": "grpo_lightning.TransformersEngine"},
                "prompts_per_rollout": 2,
                "samples_per_prompt": 2,
            },
        }
        (folder / "my_run.yaml").write_text(yaml.safe_dump(run))
        assert main(["fit", "-c", "my_run.yaml", "-c", "spo.yaml", "--dry-run", "checked"]) == 0
        checked = yaml.safe_load((folder / "checked" / "config.yaml").read_text())["model"]["init_args"]
        assert (checked["surrogate"], checked["surrogate_args"]) == ("my_losses.spo", {"width": 0.3})


def fields(package, file, name):
    """Annotated names of a class, read without importing its package."""
    home = importlib.util.find_spec(package)
    if home is None:
        pytest.skip(f"{package} is not installed")
    path = Path(home.submodule_search_locations[0]) / file
    (found,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    return {n.target.id for n in found.body if isinstance(n, ast.AnnAssign)}


def test_trls_names_are_trls():
    page = (DOCS / "coming-from-trl.md").read_text(encoding="utf-8")
    table = page[page.index("### The loss") : page.index("## What differs")]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", table, flags=re.MULTILINE)
    assert len(rows) > 20
    used = {name for left, _ in rows for name in re.findall(r"`(\w+)(?:=[^`]*)?`", left)}
    assert used <= fields("trl", "trainer/grpo_config.py", "GRPOConfig")
    ours = {name for _, right in rows for name in re.findall(r"`(\w+)(?:: [^`]+)?`", right)}
    values = {name for registry in REGISTRIES.values() for name in registry} | {"epsilon_high", "low"}
    assert ours - values <= settings(GRPOModule, RolloutDataModule)

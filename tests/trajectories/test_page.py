"""The page as a file: nothing remote, nothing that a text could end, and not larger than allowed."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources

import pytest
from guessing import byte_ids, episode_of, guessing_epoch, stored

from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.types import Task
from grpo_lightning.trajectories.page import embedded_json, render

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>\u2028\u2029&amp;{{ script }}"
VIEWER = resources.files("grpo_lightning.trajectories") / "viewer"


class Elements(HTMLParser):
    """Every element with its attributes and its text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=False)
        self.found = []
        self.open = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open = []
        self.found.append((tag, dict(attributes), self.open))

    def handle_endtag(self, tag):
        self.open = []

    def handle_data(self, data):
        self.open.append(data)

    def named(self, tag):
        return [(attributes, "".join(texts)) for name, attributes, texts in self.found if name == tag]


def raw(token_id):
    return bytes([token_id])


def written(epochs, **settings):
    return render("run", list(epochs), epochs.__getitem__, raw, **settings)


@pytest.fixture(scope="module")
def hostile_page():
    group = Group(Task(HOSTILE), (episode_of([(HOSTILE, HOSTILE)], rewards={HOSTILE: 1.0}),))
    return render(HOSTILE, [0], lambda number: stored([group]), raw).html


def test_text_of_the_run_cannot_end_an_element(hostile_page):
    elements = Elements(hostile_page)
    assert [attributes.get("id") for attributes, _ in elements.named("script")] == ["about", "pieces", "epoch-0", None]
    assert elements.named("img") == []
    data = json.loads(elements.named("script")[2][1])
    assert data["groups"][0]["task"] == HOSTILE
    assert data["rewardNames"] == [HOSTILE]
    assert json.loads(elements.named("script")[0][1])["title"] == HOSTILE


@pytest.mark.parametrize("character", "<>&\u2028\u2029\ud800é")
def test_embedded_json_is_plain_ascii_without_markup(character):
    text = embedded_json({character: [character]})
    assert json.loads(text) == {character: [character]}
    assert character not in text
    assert text.isascii()


def test_nothing_remote_is_named(hostile_page):
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+|@import|url\(|\bsrc=\"|import\(|fetch\(|XMLHttp", hostile_page) == []
    assert [attributes for attributes, _ in Elements(hostile_page).named("link")] == []


def test_only_the_page_s_own_script_and_style_are_allowed(hostile_page):
    elements = Elements(hostile_page)
    policy = next(a["content"] for a, _ in elements.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for name, text in (("script-src", elements.named("script")[-1][1]), ("style-src", elements.named("style")[0][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"


def test_model_text_is_never_made_into_markup_or_code():
    for script in (path for path in VIEWER.iterdir() if path.name.endswith(".js")):
        source = script.read_text(encoding="utf-8")
        banned = (
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"(on|style)"
        )
        assert re.findall(banned, source) == [], script.name


def test_the_script_is_valid(tmp_path, hostile_page):
    if shutil.which("node") is None:
        pytest.skip("there is no node to check the script with; the tests of the viewer run it where there is Chromium")
    (tmp_path / "page.js").write_text(Elements(hostile_page).named("script")[-1][1], encoding="utf-8")
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True, capture_output=True)


def test_the_newest_epochs_are_kept_and_older_ones_are_not_loaded():
    epochs = {number: guessing_epoch(number, byte_ids, groups=2) for number in range(6)}
    # The first that does not fit brings pieces that no other has.
    epochs[2] = stored([Group(Task("t"), (episode_of([("ÿ" * 999, "þ" * 999)]),))])
    loaded = []

    def load(number):
        loaded.append(number)
        return epochs[number]

    allowed = len(written({n: epochs[n] for n in (3, 4, 5)}).html)
    page = render("run", list(epochs), load, raw, max_bytes=allowed)
    assert (page.epochs, page.left_out) == ((3, 4, 5), (0, 1, 2))
    assert loaded == [5, 4, 3, 2]
    assert len(page.html) <= allowed + 100
    about, pieces, *rest = (json.loads(text) for _, text in Elements(page.html).named("script")[:-1])
    assert about["leftOut"] == [0, 1, 2]
    assert [row["epoch"] for row in about["epochs"]] == [3, 4, 5]
    assert len(rest) == 3
    whole = json.loads(Elements(written({n: epochs[n] for n in (3, 4, 5)}).html).named("script")[1][1])
    assert pieces == whole


def test_the_newest_epoch_is_there_even_if_it_is_too_large():
    page = written({number: guessing_epoch(number, byte_ids, groups=2) for number in range(2)}, max_bytes=10)
    assert (page.epochs, page.left_out) == ((1,), (0,))


def test_prompts_are_written_once_for_a_group():
    told = "x" * 5000
    few = written({0: stored([Group(Task("t"), (episode_of([(told, "a")]),))])})
    many = written({0: stored([Group(Task("t"), (episode_of([(told, "a")]),) * 8)])})
    assert len(many.html) - len(few.html) < 3000


def test_a_page_of_the_demo_s_size_is_small():
    # Bytes as tokens: about as many of them as the demo's completions and prompts have.
    epoch = guessing_epoch(3, lambda text: byte_ids(text)[::3], groups=16, size=8)
    tokens = sum(len(ledger) for group in epoch.groups for episode in group.episodes for ledger in episode.ledgers)
    assert tokens > 128 * 100
    empty = len(written({0: stored([])}).html)
    assert 16 * (len(written({0: epoch}).html) - empty) + empty < 5_000_000


def test_a_run_without_episodes_is_a_page_too():
    page = written({2: stored([], number=2)})
    assert page.epochs == (2,)
    assert json.loads(Elements(page.html).named("script")[0][1])["epochs"] == [
        {"epoch": 2, "episodes": 0, "reward": None}
    ]

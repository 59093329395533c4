"""The page in a browser: all of it is there, it asks for nothing, and it can be read everywhere."""

import json
import re

import pytest
from browser import CHROMIUM
from doctor_records import content, failed_record, healthy_record

from grpo_lightning.diagnostics.record import Record
from grpo_lightning.diagnostics.report.page import render

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium to look at the page with (apt: chromium)"
)

HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e𝔘\ud800 {{ style }} &amp;"


@pytest.fixture
def show(browser, tmp_path):
    def write(record, title="demo/version_0"):
        path = tmp_path / "doctor.html"
        path.write_text(render(json.loads(json.dumps(record)), title), encoding="utf-8", errors="replace")
        browser.open(path)

    return write


def test_a_healthy_run(browser, show):
    show(healthy_record())
    assert browser.text("h1") == "demo/version_0"
    assert browser.text(".verdict h2") == "No failure was found."
    assert browser.value("document.querySelectorAll('.panel').length") == 18
    assert browser.value("document.querySelectorAll('.panel svg[role=img][aria-label]').length") == 18
    assert all(text.startswith("Healthy: ") for text in browser.texts(".panel figcaption"))
    assert browser.value("document.querySelectorAll('.story > *').length") == 0
    assert "SmolLM2-135M-Instruct" in browser.text(".facts")


def test_a_failed_run_in_the_order_in_which_it_is_read(browser, show):
    record = failed_record()
    show(record)
    assert browser.text(".verdict h2") == "The engine serves an older version than it reports."
    assert record["diagnosis"]["fix"] in browser.text(".fix")
    titles = browser.texts("main h2")
    assert titles == [
        "The engine serves an older version than it reports.",
        "From the cause to its symptoms",
        "Evidence",
        "Healthy runs that look alike, ruled out",
        "Time lost",
        "Checks",
        "Measurements",
        "Curves",
        "Provenance",
    ]
    assert browser.texts(".chain b") == [
        "the engine serves an older version than it reports",
        "trainer and engine disagree and no known cause explains it",
    ]
    assert browser.texts(".evidence tbody td") == ["0.012", "0.021", "47", "5.3", "512"]
    assert "2.5 h (2 h 30 min)" in browser.text(".story section:nth-of-type(4)")
    assert browser.value("document.querySelector('pre').textContent") == record["diagnosis"]["text"]
    assert browser.texts("h3.bad, h3.good, h3.note") == ["Failed 2", "Passed 1", "Could not tell (no power) 1"]


def test_numbers_are_in_the_pictures(browser, show):
    show(failed_record())
    labels = dict(zip(browser.texts(".panel:has(svg) h3"), labels_of(browser), strict=True))
    assert re.search(r"α 0\.0\d+ ± 0\.00\d+ at version 30; β ", labels["Sync dial"])
    assert "mlp.up_proj 0.02" in labels["Marker adapter by module family"]
    assert "mlp.down_proj no power" in labels["Marker adapter by module family"]
    assert "noise floor 0.0021 nats" in labels["Log-ratio by updates since sampling"]
    assert "staleness 12.0%" in labels["Mismatch between sampler and trainer, by source"]
    assert "observed from " in labels["Surprisal of sampled tokens"]
    assert "+5.3 at 5.3" in labels["Surprisal, difference summed up"]
    assert browser.value("document.querySelectorAll('.heat.h4').length") == 1
    assert "observed from -0.0" in labels["Change of the loss by a step"]
    assert "distinct from 0.9 at rollout 0 to 0.9 at rollout 15" in labels["Groups and completions"]
    assert "something from 0 at update 0" in labels["Other: series"]


def labels_of(browser):
    return browser.value("[...document.querySelectorAll('.panel svg')].map((e) => e.getAttribute('aria-label'))")


def test_what_is_missing_is_said(browser, show):
    show(content(Record(), facts={}))
    assert browser.text(".verdict h2") == "Nothing could be judged."
    assert browser.value("document.querySelectorAll('svg').length") == 0
    reasons = browser.texts(".panel .empty")
    assert len(reasons) == 15
    assert all(len(reason) > 20 for reason in reasons)


@pytest.mark.parametrize("record", [{}, {"diagnosis": {}, "parts": None, "curves": None, "run": None}])
def test_a_record_with_nothing_in_it(browser, show, record):
    show(record)
    assert browser.text(".verdict h2") == "Nothing could be judged."


def hostile(value):
    """The same record with every text in it replaced, and names too where they are data."""
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_is_text(browser, show):
    record = failed_record()
    made = hostile(record)
    made["diagnosis"]["evidence"] = {HOSTILE: HOSTILE}
    made["versions"] = {HOSTILE: HOSTILE}
    made["parts"][HOSTILE] = {HOSTILE: [{"update": 0, HOSTILE: 1.0}, {"update": 1, HOSTILE: 2.0}]}
    made["parts"]["sampling"]["log_ratio_histograms"]["by_k"][HOSTILE] = [1.0] * 13
    show(made, HOSTILE)
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.images.length") == 0
    assert browser.value("document.styleSheets.length") == 1
    shown = HOSTILE.replace("\ud800", "?")
    assert browser.value("document.querySelector('h1').textContent") == shown
    assert browser.value("document.title") == f"{shown} · doctor"
    assert browser.value("document.querySelector('.evidence tbody th').textContent") == shown


@pytest.mark.parametrize("bad", [None, "nan", "text", 1e308, -1e308, 10**400, 1e-320, 0, True, [], {}], ids=repr)
def test_odd_numbers_break_nothing(browser, show, bad):
    def odd(value):
        if isinstance(value, dict):
            return {key: odd(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [odd(inner) for inner in value]
        return bad if isinstance(value, float) else value

    record = failed_record()
    show({**record, "parts": odd(record["parts"]), "curves": odd(record["curves"])})
    assert browser.value("document.querySelector('main').innerHTML.search(/NaN|Infinity|\"nan\"/)") == -1
    show({**odd(record), "checks": record["checks"]})
    assert browser.texts("main h2")[-1] == "Provenance"


@pytest.mark.parametrize("record", [healthy_record(), failed_record()], ids=["healthy", "failed"])
def test_nothing_sticks_out_of_a_phone(browser, show, record):
    browser.size(400, 800)
    show(record)
    assert browser.value("document.documentElement.scrollWidth") <= 400


CONTRAST = """
(() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const solid = (rgb) => rgb && !/^rgba.*, 0\\)$/.test(rgb) && rgb !== 'none';
  const behind = (e) => { for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor; if (solid(colour)) return colour; } return 'rgb(0,0,0)'; };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const texts = [...document.querySelectorAll('p,h1,h2,h3,li b,li span,td,th,dt,dd,figcaption,pre,summary,svg text')];
  const on = (e) => {
    const box = e.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
    const shapes = [...(e.ownerSVGElement?.querySelectorAll('rect.heat, rect.part') ?? [])].filter((s) => {
      const b = s.getBoundingClientRect();
      return b.x <= x && x <= b.right && b.y <= y && y <= b.bottom && solid(getComputedStyle(s).fill); });
    return shapes.length ? getComputedStyle(shapes.at(-1)).fill : behind(e);
  };
  return texts.filter((e) => e.textContent.trim()).map((e) => {
    const style = getComputedStyle(e), colour = e.ownerSVGElement ? style.fill : style.color;
    return [ratio(colour, on(e)), e.textContent.slice(0, 30)]; }).filter(([r]) => r < 4.5);
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("record", [healthy_record(), failed_record()], ids=["healthy", "failed"])
def test_all_text_can_be_read(browser, show, scheme, record):
    browser.prefer(scheme)
    show(record)
    assert browser.value("getComputedStyle(document.documentElement).backgroundColor") == (
        "rgb(251, 251, 250)" if scheme == "light" else "rgb(19, 20, 23)"
    )
    assert browser.value(CONTRAST) == []


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("record", [healthy_record(), failed_record()], ids=["healthy", "failed"])
def test_texts_of_a_picture_do_not_cover_each_other(browser, show, record, width):
    browser.size(width, 900)
    show(record)
    covered = browser.value("""
    [...document.querySelectorAll('.panel svg')].flatMap((svg) => {
      const boxes = [...svg.querySelectorAll('text')].map((e) => [e.textContent, e.getBoundingClientRect()]);
      return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
        Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
        Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4).map(([b]) =>
        svg.closest('.panel').querySelector('h3').textContent + ': ' + a + ' / ' + b));
    })""")
    assert covered == []


@pytest.mark.parametrize(
    "smuggled",
    [
        "const i = new Image(); i.src = 'picture.png'; document.body.append(i)",
        "const s = document.createElement('style'); s.textContent = 'p { color: red }'; document.body.append(s)",
        "document.body.setAttribute('style', 'color: red')",
    ],
)
def test_nothing_else_is_allowed(chromium, tmp_path, smuggled):
    path = tmp_path / "doctor.html"
    path.write_text(render(healthy_record()), encoding="utf-8")
    chromium.open(path)
    chromium.value(f"{smuggled}; 0")
    chromium.value("new Promise((done) => setTimeout(done, 100))")
    assert any("Content Security Policy" in str(complaint) for complaint in chromium.complaints())

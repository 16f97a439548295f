"""report.html, opened in the system's chromium."""

import io
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lightning_ablate.results import Results, page, panels
from lightning_ablate.results.__main__ import main
from lightning_ablate.results.evidence import Evidence
from tests.results.conftest import HEADS

HOSTILE = "</script><script>document.title = 'taken'</script>&lt;b> שלום 😀"
HEAD, NEURON = "h.0.attn.proj head 1", "h.1.attn.proj neuron 5"
PICTURE = io.BytesIO()
Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(PICTURE, "PNG")


def evidence(pictures=False):
    """Evidence of a head and a neuron under zero and peak, on two examples of 30 tokens or two pictures."""
    tokens = [HOSTILE, *(f" word{number}" for number in range(29))]
    places, generator = [0] if pictures else range(30), np.random.default_rng(0)
    rows = pd.MultiIndex.from_product([[HEAD, NEURON], ["zero", "peak"], [0, 1], places])
    frame = rows.to_frame(index=False, name=["unit", "method", "example", "place"])
    frame = frame.assign(position=frame["place"] - 1, target=3, clean=1.5, activation=generator.random(len(frame)))
    frame = frame.assign(text=[tokens[place] for place in frame["place"]], change=generator.normal(size=len(frame)))
    frame.loc[(frame["method"] == "peak") & (frame["place"] == 7), "change"] = 9.0
    promoted = pd.DataFrame({"class": [0, 1], "text": [HOSTILE, "down"], "change": [0.5, -0.25]})
    named = [promoted.assign(unit=unit, method=method) for unit in (HEAD, NEURON) for method in ("zero", "peak")]
    shown = {"picture": PICTURE.getvalue(), "tokens": None} if pictures else {"picture": None, "tokens": tokens}
    contexts = pd.DataFrame([{"example": example, "label": HOSTILE, **shown} for example in (0, 1)])
    attention = pd.DataFrame([{"unit": HEAD, "example": 0, "position": 4, "weights": [0.2] * 5}])
    reads = pd.DataFrame([{"unit": HEAD, "previous": 0.7, "first": 0.2, "itself": 0.1, "induction": np.nan}])
    kinds = frame.astype(dict.fromkeys(("unit", "method", "text"), "category"))
    return Evidence(kinds, pd.concat(named), contexts, *(() if pictures else (attention, reads)))


def neurons():
    table = pd.DataFrame({"site": "h.1.attn.proj", "neuron": range(6), "mean": 0.5, "sd": 1.0, "skewness": 0.1})
    return table.assign(excess_kurtosis=0.0, minimum=-1, maximum=2, peak=0.25, median=np.nan)


def attribution():
    keys = [("head", site, head) for site, head in HEADS] + [("neuron", "h.1.attn.proj", n) for n in range(6)]
    table = pd.DataFrame(keys, columns=["level", "site", "unit"]).assign(method="zero", se=0.01, verified_se=0.02)
    table["picked"] = ["largest", *[np.nan] * (len(table) - 1)]
    return table.assign(estimate=np.linspace(-0.2, 1, len(table)), verified=[0.5, *[np.nan] * (len(table) - 1)])


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a file; no error, and no request for anything else, may come until the test ends."""
    said, asked, files, tab = [], set(), set(), browser.new_page()
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.add(request.url))

    def opens(path):
        assert path.stat().st_size <= page.LARGEST
        files.add(path.as_uri())
        tab.goto(path.as_uri())
        return tab

    yield opens
    assert said == [] and {url for url in asked if not url.startswith(("data:", "blob:"))} == files
    tab.close()


def column(tab, selector, number=1):
    return tab.locator(f"{selector} tbody td:nth-child({number})").all_inner_texts()


def test_a_click_opens_a_unit_and_its_methods_switch(made, opened, tmp_path):
    results = made(places=HEADS, notes=[HOSTILE])
    results.gathered = evidence()
    tab = opened(page.write(tmp_path, results, attribution(), neurons()))
    assert HOSTILE in tab.locator(".note").first.inner_text() and "taken" not in tab.title()
    squares = tab.locator("#maps .nsewdrag").bounding_box()
    tab.mouse.click(squares["x"] + squares["width"] / 2, squares["y"] + squares["height"] / 4)
    assert tab.locator("#unit-head").inner_text() == HEAD and tab.locator("#evidence").is_visible()
    how = [f"{method}, {how}" for how in ("measured", "in the evidence") for method in ("zero", "peak")]
    assert set(column(tab, "#worth")) == {*how, "zero, estimated"}
    assert HOSTILE in tab.locator("#contexts").inner_text() and column(tab, "#promoted") == [HOSTILE]
    assert "0.7" in tab.locator("#attention").inner_text() and "peak" in tab.locator("#compared").inner_text()
    assert "adds 9 " not in tab.locator("#contexts").inner_text()
    tab.get_by_label("Replacement").select_option("peak")
    assert tab.locator("#contexts .asked").first.inner_text() == " word6"
    tab.get_by_label("Search").last.fill("neuron 5")
    tab.get_by_role("link", name=NEURON).press("Enter")
    assert tab.locator("#unit-head").inner_text() == NEURON
    assert "mean 0.5, peak 0.25" in tab.locator("#worth").inner_text()
    assert "no attention head" in tab.locator("#attention").inner_text()
    legend = tab.locator("#distribution .legendtext").all_text_contents()
    assert legend == ["positions", "zero 0", "mean 0.5", "peak 0.25"]


def test_heads_that_are_all_measured_have_a_map_of_their_own(made):
    table, scores = attribution(), made(places=HEADS)
    heads = table["level"] == "head"
    table.loc[heads, ["verified", "picked"]] = [0.25, "all"]
    worths = panels.worth(scores, table, None)
    own = worths[(worths["method"] == "zero") & (worths["how"] == "measured with attribution")]
    assert len(own) == heads.sum() and own[["value", "low", "high"]].iloc[0].tolist() == pytest.approx(
        [0.25, 0.25 - 1.96 * 0.02, 0.25 + 1.96 * 0.02]
    )
    maps = panels.content(worths, None, None, {}, 1, 10)["maps"]
    assert "zero, measured with attribution" in maps and not any("verified" in name for name in maps)
    assert set(panels.worth(scores, attribution(), None)["how"]) == {"measured", "estimated", "verified"}


def test_what_was_found_to_differ_from_0_is_in_bold(made, opened, tmp_path):
    """The q of a head is that of its measurement where all heads were measured, and else that of its estimate."""
    table, scores = attribution(), made(places=HEADS)
    table["q"], heads = [0.01, *[0.2] * 4, 0.05, *[0.3] * 5, 0.04], table["level"] == "head"
    found = panels.worth(scores, table, None).groupby("how")["found"].sum()
    measured = int((scores.compare(other="none")["q"] <= 0.05).sum())
    assert found.to_dict() == {"measured": measured, "estimated": 3, "verified": 0} and measured > 0
    table.loc[heads, ["verified", "picked"]] = [0.25, "all"]
    again = panels.worth(scores, table, None).groupby("how")["found"].sum()
    assert again["estimated"] == 1 and again["measured with attribution"] == 2
    tab = opened(page.write(tmp_path, scores, table, None))
    where = tab.locator("#unit-list th").all_inner_texts().index("zero, measured with attribution") + 1
    assert tab.locator(f"#unit-list td:nth-child({where}) b").count() == 2


def test_tables_sort_and_methods_are_switched_off_by_keyboard(made, opened, tmp_path):
    tab = opened(page.write(tmp_path, made(), None, None))
    ranked = column(tab, ".methods")
    head = tab.locator(".methods th").nth(1)
    for order in ("descending", "ascending"):
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == order
        assert column(tab, ".methods") == (ranked[::-1] if order == "descending" else ranked)
    lines = tab.locator(".curves .scatterlayer .trace")
    before = lines.count()
    tab.get_by_label("peak").press("Space")
    assert lines.count() == before - 1
    tab.get_by_label("Curves of").select_option("top-1 accuracy, %")
    assert lines.count() == before - 1 and "--ablation.attribution.methods" in tab.locator("main").inner_text()


def test_pictures_layers_and_runs_without_methods_have_pages(made, opened, tmp_path):
    results = made(places=[("h.0", None), ("h.1", None)])
    results.gathered = evidence(pictures=True)
    tab = opened(page.write(tmp_path, results))
    assert tab.locator("#contexts img").count() == 2 and tab.locator("#maps .bars .point").count() == 2
    opened(page.write(tmp_path, Results(results.table[:1], None, {})))


def test_units_that_were_named_alone_have_a_page_and_unknown_ones_none(made, opened, tmp_path):
    results = made()
    results.gathered = evidence()
    tab = opened(page.write(tmp_path, results, None, neurons()))
    assert tab.locator("#maps .plotly").count() == 0 and tab.locator("#unit-head").inner_text() == HEAD
    assert column(tab, "#unit-list") == [HEAD] and tab.locator("#contexts .context").count() == 10
    tab.evaluate("location.hash = 'unit=nothing'")
    assert tab.locator("#unit-head").inner_text() == HEAD


def test_a_page_holds_fewer_rows_where_all_would_not_fit(made, tmp_path, monkeypatch):
    given = tmp_path, made(places=HEADS), attribution(), neurons()
    whole = page.write(*given).stat().st_size
    monkeypatch.setattr(page, "LARGEST", whole - 1)
    monkeypatch.setattr(page, "_CAPS", ((10, 6), (1, 2)))
    assert page.write(*given).stat().st_size < whole


def test_joined_runs_have_one_page(made, opened, tmp_path, capsys):
    for name in ("one", "two"):
        made(["zero"]).save(tmp_path / name)
    main([str(tmp_path / "one"), str(tmp_path / "two"), "--names", "A", "B", "--out", str(tmp_path)])
    assert f"open {tmp_path / 'report.html'}\n" in capsys.readouterr().out
    assert column(opened(tmp_path / "report.html"), ".methods") == ["zero (A)", "zero (B)"]
    with pytest.raises(SystemExit, match="is the folder of a run"):
        main([str(tmp_path / "one"), "--out", str(tmp_path / "two")])

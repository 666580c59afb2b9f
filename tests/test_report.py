"""Reports in a real browser without a network: every plot drawn, sliders that slide, nothing asked of anybody."""
import io
import os
import shutil

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

from autohdr.runs.execute import RunError, run
from autohdr.runs.spec import make_spec
from tests.toys import toy

PIECES = """
import numpy as np, pandas as pd, plotly.graph_objects as go
from autohdr.runs.report import *
epochs = np.arange(1, 11)
history = pd.DataFrame(dict(epoch=epochs, loss=1/epochs, val_l1=1/epochs + 0.01*epochs, val_psnr=20 + epochs/5, lr=1e-3/epochs))
scores = pd.DataFrame(dict(name=["kitchen", "hall", "bath"], l1=[0.05, 0.09, 0.04], psnr=[23., 18., 25.]))
black, white, red = (np.full((200, 300, 3), c, np.float32) for c in ((0, 0, 0), (1, 1, 1), (1, 0, 0)))
"""
CELLS = [PIECES, 'headline({"l1": 0.05, "psnr": 23.}, {"gamma": {"l1": 0.09, "psnr": 19.}}, "toy")', "curves(history)", "display(go.Figure().add_bar(y=[1, 3, 2]))",
         'slider(black, white, red, "three colours")', 'error_map(white*0.9, white, caption="grey")', "photo_table(scores)", "environment()",
         "from IPython.display import HTML, Markdown\nHTML(\"<img src='https://example.com/a.png'><script src='https://example.com/b.js'></script><link href='//example.com/c.css'>\")",
         "Markdown('![remote](http://example.com/d.png) and $x^2$')"]


def browser_path():
    """Chromium, or a skip with the reason; in CI its absence is a failure."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("CI needs Chromium to look at the reports (Debian: apt-get install chromium)")
    if found is None:
        pytest.skip("no Chromium here to look at the reports with")
    return found


@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One run with every piece, and one that fails."""
    folder = tmp_path_factory.mktemp("reports")
    good = run(make_spec(str(toy(folder, "good", *CELLS)), ["steps=5"], name="good"), folder / "runs", echo=False)
    with pytest.raises(RunError) as failed:
        run(make_spec(str(toy(folder, "bad", "print('so far')", "1/0", "print('never')")), name="bad"), folder / "runs", echo=False)
    return dict(good=good, bad=failed.value.run_dir)


@pytest.fixture
def open_report(browser):
    """A function that opens a report with the network off and fails on any wish for it and any error of a script."""
    contexts, wrong = [], []

    def open_it(run_dir, width=1400):
        contexts.append(browser.new_context(viewport=dict(width=width, height=900), offline=True))
        page = contexts[-1].new_page()
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        page.goto((run_dir / "report.html").as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.mark.parametrize("width", [1400, 390])
def test_every_plot_is_drawn(reports, open_report, width):
    page = open_report(reports["good"], width)
    plots = page.locator(".js-plotly-plot")
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    nb = nbformat.read(reports["good"] / "run.ipynb", as_version=4)
    stored = sum("application/vnd.plotly.v1+json" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", []))
    assert plots.count() == stored == 2
    for plot in plots.all():
        assert plot.locator(".main-svg").count() > 0 and plot.bounding_box()["height"] > 100
    lines = page.locator(".js-plotly-plot path.js-line").evaluate_all("all => all.map(e => e.getAttribute('d').length)")
    assert len(lines) == 4 and min(lines) > 20, "loss, val_l1, val_psnr, lr"
    assert page.locator(".js-plotly-plot .bars .point").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over the side"


def colours(page):
    """Colour of the slider's picture at a quarter, and at three quarters of its width."""
    stage = page.locator(".ah-stage")
    image = np.asarray(Image.open(io.BytesIO(stage.screenshot())).convert("RGB"))
    names = {(0, 0, 0): "black", (255, 255, 255): "white", (255, 0, 0): "red"}
    near = lambda rgb: min(names, key=lambda c: np.abs(np.subtract(c, rgb.astype(int))).sum())
    return tuple(names[near(image[image.shape[0] // 2, int(image.shape[1] * x)])] for x in (0.25, 0.75))


@pytest.mark.parametrize("width", [1400, 390])
def test_slider_slides(reports, open_report, width):
    page = open_report(reports["good"], width)
    assert colours(page) == ("black", "white")
    page.locator(".ah-stage").scroll_into_view_if_needed()
    box = page.locator(".ah-stage").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.1, middle, steps=5)
    page.mouse.up()
    assert colours(page) == ("white", "white"), "moved to the left: ours everywhere"
    page.keyboard.press("End")
    assert colours(page) == ("black", "black"), "the keyboard moves it, too"
    page.get_by_text("ours | after").click()
    assert colours(page) == ("white", "white")
    page.locator(".ah-stage input").fill("50")
    assert colours(page) == ("white", "red")


def test_table_sorts(reports, open_report):
    page = open_report(reports["good"])
    names = page.locator("table:has(th button) tbody td:first-child")
    assert names.all_inner_texts() == ["hall", "kitchen", "bath"], "worst first"
    page.get_by_role("button", name="L1", exact=True).click()
    assert names.all_inner_texts() == ["bath", "kitchen", "hall"]
    page.get_by_role("button", name="name").click()
    assert names.all_inner_texts() == ["bath", "hall", "kitchen"]


def test_code_is_folded_away(reports, open_report):
    page = open_report(reports["good"])
    code = page.locator("details.code .highlight").first
    assert not code.is_visible()
    page.get_by_role("button", name="Show code").click()
    assert code.is_visible() and "steps" in page.locator("details.code").first.inner_text()


def test_complete_run_says_so(reports, open_report):
    page = open_report(reports["good"])
    assert page.locator(".state").inner_text() == "complete" and page.locator(".reason").count() == 0
    page.get_by_text("Repeat this run").click()
    assert "-p steps=5" in page.locator(".again code").inner_text()
    page.locator("header summary", has_text="Parameters").click()
    assert page.locator("header tr.changed").inner_text().split() == ["steps", "5"]
    assert yaml.safe_load((reports["good"] / "params.yaml").read_text())["parameters"]["steps"] == 5


def test_failed_run_says_why(reports, open_report):
    page = open_report(reports["bad"])
    assert page.locator(".state").inner_text() == "failed" and "ZeroDivisionError" in page.locator(".reason").inner_text()
    assert "1/0" in page.locator("header pre").inner_text() and page.locator("section.pending").count() == 1
    page.get_by_text("Go to the cell").click()
    assert page.locator("section.failed").is_visible()

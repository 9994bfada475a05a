"""The chapter and the page as a person meets them: JupyterLab and Voila on this machine, driven in headless Chromium.

Screenshots are kept in tests/screenshots, which is not part of the repository.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "tests" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MINUTE = 60_000  # milliseconds

pytest.importorskip("playwright", reason="a browser is driven by playwright: pip install playwright")
pytest.importorskip("voila", reason="the page needs the extra ris_nb[explore]")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: make chromium"), pytest.mark.slow, pytest.mark.timeout(900)]

from playwright.sync_api import sync_playwright

from ris_nb.models.photo import PhotoLAVT


@pytest.fixture(scope="module")
def page():
    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(5 * MINUTE)
        yield page
        browser.close()


def start(tmp_path, *command):
    """A server on a free port, its settings and logs in a folder of its own: (process, address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR")}
    env = {**os.environ, **folders, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, *(part.format(port=port) for part in command)], cwd=tmp_path, env=env, stdout=log, stderr=log,
                                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores Ctrl-C
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=60).close()
            return server, address
        except OSError:
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
    raise AssertionError((tmp_path / "log").read_text())


@pytest.fixture(scope="module")
def lab(tmp_path_factory, page):
    """The chapter, open in JupyterLab, all of its cells run."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = json.loads((ROOT / "nbs" / "25_explore.ipynb").read_text(encoding="utf-8"))
    notebook["cells"] = [cell for cell in notebook["cells"] if not "".join(cell["source"]).startswith("#| slow")]
    (folder / "25_explore.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    settings = folder / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # keep what is out of sight in the page, too
    server, address = start(folder, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port={port}", "--ServerApp.ip=127.0.0.1",
                            "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None")
    page.goto(f"{address}/lab/tree/25_explore.ipynb")
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    assert page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    page.set_default_timeout(MINUTE)  # what follows is quick
    yield page
    server.terminate()
    server.wait()


def shot(page, panel, name):
    panel.scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def sources(panel):
    return panel.locator("img").evaluate_all("images => images.map(image => image.src)")


def await_change(page, panel, before):
    """Wait until a picture of the panel is another one; return all of them."""
    for _ in range(300):
        if sources(panel) != before:
            page.wait_for_timeout(300)  # the others follow
            return sources(panel)
        page.wait_for_timeout(100)
    raise AssertionError("no picture changed")


def type_text(panel, text):
    panel.locator("textarea").first.fill(text)


def upload(page, panel, file):
    with page.expect_file_chooser(timeout=MINUTE) as chooser:
        panel.get_by_role("button", name="Upload a photo").click()
    chooser.value.set_files(file)


def choose_scenes(page, panel):
    """Drawn scenes, which three models answer, whatever the panel began with."""
    panel.locator("select").first.select_option(label="drawn scenes")
    panel.get_by_text("sag_tiny", exact=True).wait_for()
    page.wait_for_timeout(300)


def test_the_chapter_runs(lab):
    assert lab.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg").count() == 0
    for name in ("AskPanel", "FillPanel", "ShatterPanel", "LossPanel"):
        assert lab.locator(f".{name}").count() >= 1, name


def test_ask(lab):
    panel = lab.locator(".AskPanel").first
    shot(lab, panel, "ask_photo")
    choose_scenes(lab, panel)
    before = sources(panel)
    assert len(before) == 3
    type_text(panel, "the red triangle")
    typed = await_change(lab, panel, before)
    panel.get_by_role("button", name="triangle", exact=True).last.click()  # the word, not the suggestion
    word = await_change(lab, panel, typed)
    shot(lab, panel, "ask_word")
    panel.get_by_role("button", name="the answer", exact=True).click()
    back = await_change(lab, panel, word)
    handle = panel.locator(".widget-slider .noUi-handle").first
    handle.focus()
    for _ in range(6):
        handle.press("ArrowRight")
    await_change(lab, panel, back)
    assert panel.locator(".widget-slider .widget-readout").first.inner_text() != "0.50"
    shot(lab, panel, "ask_after")


def test_bad_words_are_a_line(lab):
    panel = lab.locator(".AskPanel").first
    type_text(panel, "the elephant")
    panel.get_by_role("status").get_by_text("elephant").wait_for()
    type_text(panel, "")
    panel.get_by_role("status").get_by_text("says nothing").wait_for()
    type_text(panel, "the red triangle")


def test_fill(lab):
    panel = lab.locator(".FillPanel").first
    picture = panel.locator("img").first
    tables = panel.locator("table").first
    words = panel.locator(".widget-toggle-buttons").first.get_by_role("button")
    before = panel.locator("table").all_inner_texts()
    words.first.click()
    lab.wait_for_function("([panel, before]) => [...panel.querySelectorAll('table')].map(t => t.innerText).join() !== before",
                          arg=[panel.element_handle(), ",".join(before)])
    source = sources(panel)
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    lab.mouse.move(x, y)
    lab.mouse.down()
    for step in range(1, 9):
        lab.mouse.move(x + 5 * step, y - 4 * step)
    lab.mouse.up()
    await_change(lab, panel, source)
    assert panel.locator(".widget-slider .widget-readout").first.inner_text() not in ("0", "")  # the sliders say how far it went
    assert tables.is_visible() and picture.get_attribute("alt").startswith("The scene, with a mask over")
    shot(lab, panel, "fill")


def test_shatter(lab):
    panel = lab.locator(".ShatterPanel").first
    picture = panel.locator("img").first
    before = sources(panel)
    panel.get_by_role("button", name="2a", exact=True).click()
    clicked = await_change(lab, panel, before)
    assert "lit: 2a" in picture.get_attribute("alt")
    picture.hover(position={"x": 20, "y": 20})
    lab.wait_for_timeout(500)
    lit = picture.get_attribute("alt").split("lit: ")[1]
    assert lit != "all"
    panel.get_by_role("button", name="all", exact=True).click()
    plain = await_change(lab, panel, sources(panel)) if sources(panel) == clicked else sources(panel)
    picture.focus()
    for _ in range(5):
        picture.press("ArrowRight")  # the pointer without a mouse
    await_change(lab, panel, plain)
    handle = panel.locator(".widget-slider .noUi-handle").first
    handle.focus()
    now = sources(panel)
    handle.press("ArrowLeft")
    await_change(lab, panel, now)
    shot(lab, panel, "shatter")


def test_loss_lab(lab):
    panel = lab.locator(".LossPanel").first
    before = panel.locator("svg").first.get_attribute("aria-label")
    handle = panel.locator(".widget-slider .noUi-handle").first
    handle.focus()
    for _ in range(5):
        handle.press("ArrowRight")
    lab.wait_for_function("([panel, before]) => panel.querySelector('svg').getAttribute('aria-label') !== before", arg=[panel.element_handle(), before])
    shot(lab, panel, "loss")


def test_every_expression_brings_a_picture(lab):
    panel = lab.locator(".AskPanel").first
    for colour in ("red", "blue", "green", "yellow"):
        before = sources(panel)
        type_text(panel, f"the {colour} thing")
        await_change(lab, panel, before)


def test_the_page_of_ris_nb_explore(page, tmp_path):
    server, address = start(tmp_path, "-m", "ris_nb.cli", "explore", "--port", "{port}", "--no-browser")
    try:
        page.goto(address)
        panel = page.locator(".AskPanel").first
        panel.wait_for()
        choose_scenes(page, panel)
        before = sources(panel)
        type_text(panel, "the leftmost thing")
        await_change(page, panel, before)
        page.screenshot(path=SCREENSHOTS / "voila.png")
        page.get_by_role("tab", name="Loss lab").click()
        page.locator(".LossPanel svg").first.wait_for()
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0


def test_a_photo_of_ones_own_on_the_page(page, tmp_path):
    """A phone's photo is uploaded, two sentences are typed, the threshold is moved, and a file that is no photo is one line."""
    bert = dict(model_type="bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    PhotoLAVT(64, "bert-base-uncased", vision={"timm": "tf_efficientnet_lite0", "pretrained": False},
              text={"hf": "small", "pretrained": False, "layers": 1, "config": bert}).save_pretrained(tmp_path / "mine")
    photo, exif = Image.open(sorted((ROOT / "data" / "refphotos" / "photos").glob("*.jpg"))[0]), Image.Exif()
    exif[0x0112] = 6  # held upright, stored lying
    photo.rotate(90, expand=True).save(tmp_path / "phone.jpg", exif=exif)
    (tmp_path / "notes.txt").write_text("no photo")
    server, address = start(tmp_path, "-m", "ris_nb.cli", "explore", "--models", "mine", "--port", "{port}", "--no-browser")
    try:
        page.goto(address)
        panel = page.locator(".AskPanel").first
        panel.locator("img").nth(1).wait_for()  # a photo of RefPhotos with two sentences
        before = sources(panel)
        upload(page, panel, tmp_path / "phone.jpg")
        panel.get_by_role("status").get_by_text("says nothing").wait_for()
        uploaded = await_change(page, panel, before)
        assert len(uploaded) == 1 and "phone.jpg" in panel.locator("select").first.locator("option:checked").inner_text()
        type_text(panel, "the man on the left\nthe sky")
        typed = await_change(page, panel, uploaded)
        assert len(typed) == 2
        panel.get_by_text("the sky", exact=True).wait_for()
        width, height = panel.locator("img").first.evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert (width > height) == (photo.width > photo.height)
        handle = panel.locator(".widget-slider .noUi-handle").first
        handle.focus()
        for _ in range(9):
            handle.press("ArrowLeft")
        moved = await_change(page, panel, typed)
        page.screenshot(path=SCREENSHOTS / "own_photo.png")
        upload(page, panel, tmp_path / "notes.txt")
        panel.get_by_role("status").get_by_text("notes.txt: can't be read").wait_for()
        assert sources(panel) == moved
        type_text(panel, "the man on the left\nthe sky\nthe ground")
        panel.get_by_text("the ground", exact=True).wait_for()
        page.screenshot(path=SCREENSHOTS / "own_photo_line.png")
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0

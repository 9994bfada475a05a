"""The site, built as `make site` builds it: no warning, no dead link, no picture without a text; and read in headless Chromium."""
from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ris_nb
from ris_nb.course.editions import read_notebook, text_of

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

for package in ("sphinx", "myst_nb", "sphinx_book_theme", "autodoc2"):
    pytest.importorskip(package, reason='the site is built by Sphinx: pip install -e ".[site]"')
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def site(shared):
    """The folder of a fresh build."""
    folder = shared("site", build)
    assert (folder / "log").read_text() == "0 0"
    return folder / "html"


def build(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pages = subprocess.run([sys.executable, "nbs/site/pages.py", folder / "pages"], cwd=ROOT, env=env, capture_output=True, text=True)
    sphinx = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "doctrees", "-c", "nbs/site", folder / "pages", folder / "html"],
                            cwd=ROOT, env=env, capture_output=True, text=True)
    (folder / "log").write_text(pages.stderr + sphinx.stderr + f"{pages.returncode} {sphinx.returncode}")


class Page(HTMLParser):
    """The anchors, links and pictures of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.pictures = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if tag == "img":
            self.pictures.append(attrs)


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}


def test_every_notebook_has_a_page(site):
    for folder in (".", "workshop", "exercises", "teaching"):
        notebooks = {path.stem for path in (ROOT / "nbs" / folder).glob("*.ipynb")}
        assert notebooks and notebooks <= {path.stem for path in (site / folder).glob("*.html")}


def test_no_page_holds_a_solution(site):
    """Nor does anything that lies beside the pages: exams are there as students get them, or not at all."""
    for path in [path for room in ("exercises", "teaching", "student") for path in (site / room).rglob("*") if path.suffix in (".html", ".ipynb")]:
        assert not re.search("(BEGIN|END) (SOLUTION|HIDDEN|RUBRIC)|This notebook holds the solutions", path.read_text(encoding="utf-8")), path
    looked = 0
    for source in [path for room in ("exercises", "teaching") for path in sorted((ROOT / "nbs" / room).glob("*.ipynb"))]:
        page = (site / source.relative_to(ROOT / "nbs")).with_suffix(".html").read_text(encoding="utf-8")
        shown = " ".join(unescape(re.sub("<[^>]+>", "", page)).split())
        for cell in read_notebook(source)["cells"]:
            for region in re.findall(r"BEGIN (?:SOLUTION|HIDDEN TESTS|RUBRIC).*?\n(.*?)\n[^\n]*END ", text_of(cell), re.S):
                for line in (" ".join(line.split()) for line in region.splitlines()):
                    looked += 1
                    assert len(line) < 25 or line not in shown, (source.name, line)
    assert looked > 1000 and not list((site / "student").rglob("midterm*")) and not list((site / "student").rglob("final*"))


def test_the_rocket_of_an_exercise_opens_the_students_edition(site, pages):
    for path in [*(site / "exercises").glob("[0-9]*.html"), *(site / "teaching").glob("*.html")]:
        launch = [link for link in pages[path].links if re.match(r"https://(colab\.research|mybinder)", link)]
        name = f"{path.relative_to(site).with_suffix('').as_posix()}.ipynb"
        if path.stem in ("midterm", "final", "instructor", "syllabus"):
            assert launch == []
        else:
            assert (site / "student" / "nbs" / name).is_file()
            assert sorted(launch) == [f"https://colab.research.google.com/github/ris-nb/ris_nb/blob/gh-pages/student/nbs/{name}",
                                      f"https://mybinder.org/v2/gh/ris-nb/ris_nb/main?urlpath=lab/tree/student/nbs/{name}"]
    assert "course student --out student" in (ROOT / "binder" / "postBuild").read_text()
    assert (site / ".nojekyll").exists()  # or GitHub leaves out _static
    assert "nbs/exercises/07_lavt.ipynb" in zipfile.ZipFile(site / "student.zip").namelist()


def test_every_link_leads_somewhere(site, pages):
    dead, seen = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            seen += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert seen > 1000 and not dead, dead[:20]


def test_links_out_of_the_site_name_files_that_exist(pages):
    outside = {link for page in pages.values() for link in page.links if re.search(r"github\.com/[\w-]+/ris_nb/(blob|tree)/main/", link)}
    assert outside
    for link in outside:
        assert (ROOT / unquote(urlsplit(link).path.split("/main/")[1])).exists(), link


def test_every_picture_has_a_text(site, pages):
    pictures = [(path, picture) for path, page in pages.items() for picture in page.pictures]
    assert len(pictures) > 150
    for path, picture in pictures:
        assert len(picture.get("alt", "")) > (5 if "_static" in picture["src"] else 20), (path.name, picture)  # the theme's own are logos
        assert (path.parent / unquote(picture["src"])).exists(), (path.name, picture["src"])
    assert sum("The panel" in picture["alt"] for path, picture in pictures if path.name == "25_explore.html") == 4


def test_public_names_are_described(pages):
    anchors = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "library"))
    missing = {f"ris_nb.{module}.{name}" for module, names in ris_nb._ROOMS.items() for name in names.split()} - anchors
    assert not missing
    assert not [anchor for anchor in anchors if anchor and re.search(r"^ris_nb\..*(\._|ch\d\d)", anchor)]


def test_nothing_is_fetched(site):
    for path in site.glob("*.html"):
        assert not re.search(r'<(script|img)[^>]+src="(https?:)?//|<link[^>]+rel="stylesheet"[^>]+href="(https?:)?//', path.read_text(encoding="utf-8")), path.name


# In a browser

@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def sample(site):
    """All pages but most of the workshop, of the exercises and of those for teaching, which are made in the same way."""
    few = [path for folder, step in (("workshop", 10), ("exercises", 10), ("teaching", 3)) for path in sorted((site / folder).glob("*.html"))[1::step]]
    whole = [path for folder in (".", "library") for path in sorted((site / folder).glob("*.html"))]
    return [path.relative_to(site).as_posix() for path in [*whole, *few]]


def test_pages_on_a_phone(site, chromium, address):
    """No error, no request elsewhere, no sideways scrolling, every picture and every equation there."""
    page = chromium.new_page(viewport={"width": 380, "height": 800})
    wrong, equations = [], 0
    page.on("console", lambda message: wrong.append((page.url, message.text)) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append((page.url, str(error))))
    page.on("request", lambda request: wrong.append((page.url, request.url)) if not request.url.startswith((address, "data:")) else None)
    for name in sample(site):
        page.goto(f"{address}/{name}")
        page.evaluate("async () => { await window.MathJax?.startup?.promise; }")
        width = page.evaluate("document.documentElement.scrollWidth")
        broken = page.evaluate("async () => { const bad = []; for (const i of document.images) { i.loading = 'eager'; await i.decode().catch(() => bad.push(i.src)); } return bad; }")
        drawn, asked = page.evaluate("[document.querySelectorAll('mjx-container').length, document.querySelectorAll('.math').length]")
        equations += drawn
        if width > 380 or broken or drawn < asked or page.locator("mjx-merror").count():
            wrong.append((name, width, broken, drawn, asked))
    page.close()
    assert not wrong
    assert equations > 100


def test_search_finds_mask_grounding(chromium, address):
    page = chromium.new_page()
    page.goto(f"{address}/search.html?q=mask+grounding")
    page.locator("ul.search li a").first.wait_for(timeout=60_000)
    assert any("10_mask_grounding" in link for link in page.locator("ul.search li a").evaluate_all("links => links.map(link => link.href)"))
    page.close()


CONTRAST = """() => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => { const [r, g, b] = channels(colour).slice(0, 3).map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
                              return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = node => { for (; node; node = node.parentElement) { const c = getComputedStyle(node).backgroundColor; const a = channels(c)[3];
                                                                      if (a === undefined || a > 0.99) return c; } return 'rgb(255, 255, 255)'; };
    const worst = {};
    for (const node of document.querySelectorAll('article p, article li, article h1, article h2, article td, article a.reference, article pre, article pre span, dt.sig')) {
        if (!node.textContent.trim() || !node.offsetParent) continue;
        const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
        const kind = node.tagName, ratio = (a + 0.05) / (b + 0.05);
        worst[kind] = Math.min(worst[kind] ?? 99, ratio);
    }
    return [worst, light(getComputedStyle(document.body).backgroundColor)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(chromium, address, scheme):
    """Contrast of at least 4.5 to 1, as WCAG 2.2 AA asks."""
    context = chromium.new_context(color_scheme=scheme)
    page = context.new_page()
    for name in ("index", "10_mask_grounding", "library/models", "results"):
        page.goto(f"{address}/{name}.html")
        worst, ground = page.evaluate(CONTRAST)
        assert (ground < 0.1) == (scheme == "dark")
        assert len(worst) >= 4 and min(worst.values()) >= 4.5, (name, worst)
    context.close()


def test_the_keyboard_reaches_everything(chromium, address):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/10_mask_grounding.html")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("""() => { const a = document.activeElement;
            return [a.textContent.trim(), !!a.closest('.bd-sidebar-primary nav'), !!a.closest('.article-header-buttons'), a.getAttribute('aria-label') || a.title || a.textContent.trim()]; }"""))
    assert reached[0][0] == "Skip to main content"
    assert any(inside for _, inside, _, _ in reached), reached
    assert all(name for *_, name in reached)  # everything says what it is
    launch = page.locator("a[href*='colab'], a[href*='mybinder']").evaluate_all("links => links.map(link => link.href)")
    assert any(link.endswith("/ris_nb/blob/main/nbs/10_mask_grounding.ipynb") for link in launch) and any("mybinder.org" in link for link in launch), launch
    page.close()

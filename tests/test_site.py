"""The site: its sources say everything and run, and what `make docs` built works in a browser."""

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

import pytest

from tests.test_docs import public

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = DOCS / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SOURCES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]


# The sources


def test_the_reference_has_every_public_name() -> None:
    listed: list[str] = []
    for page in (DOCS / "reference").glob("*.md"):
        module = ""
        for kind, name in re.findall(
            r"^\.\. (currentmodule|auto\w+):: (\S+)$", page.read_text(), re.MULTILINE
        ):
            module = name if kind == "currentmodule" else module
            if kind != "currentmodule":
                listed.append(f"{module}.{name}")
    assert len(listed) == len(set(listed))
    assert {name.replace("paramtree.inspect.plots", "paramtree.plots") for name in public()} <= set(
        listed
    )


@pytest.mark.parametrize("source", SOURCES, ids=[str(path.relative_to(DOCS)) for path in SOURCES])
def test_every_block_of_code_is_run(source: Path) -> None:
    text = source.read_text()
    languages = re.findall(r"^`{3,}(\w+)", text, re.MULTILINE)
    assert set(languages) <= {"sh", "text"}
    if "{code-cell}" in text:
        assert text.startswith("---\nfile_format: mystnb\n")


# The site that was built

site = [
    pytest.mark.slow,
    pytest.mark.skipif(not SITE.exists(), reason="there is no site: make docs"),
]


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if anchor := found.get("id") or (tag == "a" and found.get("name")):
            self.anchors.add(str(anchor))
        for name in ("href", "src"):
            if link := found.get(name):
                self.links.add(link)


def pages() -> dict[str, Page]:
    return {
        str(path.relative_to(SITE)): Page(path.read_text(encoding="utf-8"))
        for path in SITE.rglob("*.html")
        if "_static" not in path.parts
    }


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to look with: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class TestSite:
    pytestmark = site

    def test_every_internal_link_leads_somewhere(self) -> None:
        found, broken, followed = pages(), [], 0
        for name, page in found.items():
            for link in page.links:
                if re.match(r"[a-z]+:|//", link):
                    continue
                target, anchor = urldefrag(unquote(urljoin(name, re.sub(r"\?[^#]*", "", link))))
                target = target or name
                followed += 1
                exists = target in found or (SITE / target).is_file()
                if not exists or (anchor and target in found and anchor not in found[target].anchors):
                    broken.append(f"{name}: {link}")
        assert broken == []
        assert followed > 1000

    def test_no_page_has_an_error_in_the_console_or_asks_another_host(
        self, address: str, browser: Any
    ) -> None:
        page, problems = browser.new_page(), []
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("response", lambda answer: answer.status >= 400 and problems.append(answer.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        # The next page aborts what is still under way, such as the icon.
        page.on("requestfailed", lambda r: r.failure != "net::ERR_ABORTED" and problems.append(r.url))
        page.on(
            "request",
            lambda request: request.url.startswith((address, "data:")) or problems.append(request.url),
        )
        for name in pages():
            page.goto(address + name)
        page.close()
        assert problems == []

    # What one would type, and the page that answers.
    @pytest.mark.parametrize(
        ("query", "answer"),
        {
            "train bfloat16 dropout": "guides/mixed_precision",
            "bfloat16 BatchNorm": "guides/mixed_precision",
            "vmap within a model": "guides/copies",
            "decode one step": "guides/decoding",
            "rename level": "cookbook",
            "add a level": "cookbook",
            "grow leaf vocabulary": "cookbook",
            "Repeat mask rank": "cookbook",
            "initializer axes": "guides/initialising",
            "level pytree node prefix": "design/limits",
            "weight decay": "guides/training",
            "LoRA": "guides/reparametrising",
            "checkpoint": "guides/files",
        }.items(),
    )
    def test_the_search_finds_the_page_that_answers(
        self, address: str, browser: Any, query: str, answer: str
    ) -> None:
        page = browser.new_page()
        page.goto(f"{address}search.html?q={quote(query)}")
        page.wait_for_function(
            "document.querySelector('#search-results p.search-summary')?.innerText.match(/found|match/)"
        )
        page.wait_for_timeout(500)
        results = page.eval_on_selector_all(
            "#search-results li a", "all => all.map(a => a.getAttribute('href'))"
        )
        page.close()
        assert any(answer in link for link in results[:8]), results[:12]

    def test_pages_fit_a_telephone(self, address: str, browser: Any) -> None:
        page = browser.new_page(viewport={"width": 400, "height": 800})
        wide = []
        for name in pages():
            page.goto(address + name)
            if page.evaluate("document.documentElement.scrollWidth") > 400:
                wide.append(name)
        page.close()
        assert wide == []

"""What a reader of a notebook sees: executed, exported by nbconvert, opened in a browser."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import paramtree as pt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no Chromium to look with: apt-get install chromium"
    ),
]

CELLS = [
    """
import jax, jax.numpy as jnp
import paramtree as pt
from paramtree import nn

shared = nn.Dense(8, activation="relu")
net = nn.Sequential(
    nn.Dense(8), shared, *(nn.Dense(8) for _ in range(30)), shared, nn.BatchNorm(),
    nn.Sequential(nn.Dense(3), nn.Activation("relu")),
)
params = pt.init(net, jax.random.key(0), jnp.ones((2, 20)))
params
""",
    """
params = pt.replace(params, {"dense0_bias": params.dense0.bias.at[1].set(jnp.nan)})
pt.show(params, stats=True)
""",
    """
bad = {
    "<script>window.pwned = 1</script>": 1.0,
    "'\\"><img src=x onerror='window.pwned = 2'>": 2.0,
    "javascript:alert(1)": 3.0,
    "gnirts\\u202edesrever": 4.0,
    "\\x1b[31m red \\n line": 5.0,
    "w" * 2**20: 6.0,
    "</details></div><style>*{display:none}</style>": 7.0,
    "\\u05d0\\u05d1\\u05d2": 8.0,
}
pt.show({name: jnp.full(3, value) for name, value in bad.items()} | {"s": "<b id=pwned>"}, stats=False)
""",
    """
tied = pt.tie(pt.from_tree({f"<i>{n}": {"w": jnp.ones(3)} for n in "ab"}), {"<i>b": "<i>a"})
tied
""",
    "pt.stats(params, bins=8)",
    "pt.show(pt.from_tree({f'layer{i}': {'weight': jnp.ones(3)} for i in range(10_000)}))",
]


@pytest.fixture(scope="module")
def notebook() -> Any:
    import nbformat
    from nbclient import NotebookClient

    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text.strip()) for text in CELLS])
    return NotebookClient(made, timeout=120, kernel_name="python3").execute()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module", params=["light", "dark"])
def page(
    request: pytest.FixtureRequest,
    notebook: Any,
    browser: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    from nbconvert import HTMLExporter

    text, _ = HTMLExporter(theme=request.param).from_notebook_node(notebook)
    file: Path = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    file.write_text(text)
    context = browser.new_context(viewport={"width": 1500, "height": 900})
    context.set_offline(True)
    made = context.new_page()
    made.theme = request.param
    made.dialogs = []
    made.on("dialog", lambda dialog: (made.dialogs.append(dialog.message), dialog.dismiss()))
    made.goto(file.as_uri(), wait_until="domcontentloaded")
    yield made
    context.close()


def trees(page: Any) -> Any:
    return page.locator(".paramtree")


def row(tree: Any, title: str) -> Any:
    """The row of a leaf or level, by its full name."""
    return tree.locator(f'[title="{title}"]').first.locator("xpath=..")


def open_all(tree: Any) -> None:
    tree.evaluate("tree => tree.querySelectorAll('details').forEach(level => level.open = true)")


def test_a_tree_shows_its_levels_sizes_ties_and_kinds(page: Any) -> None:
    tree = trees(page).nth(0)
    # 20 * 8 + 8 for the first, 72 for each of 31 different ones, 16 of norm and 27 at the end.
    assert "70 leaves, 2,443 parameters, 16 of state" in tree.locator(".pt-title").inner_text()
    assert row(tree, "dense0").inner_text().split() == ["dense0", "168", "672", "B", "2", "leaves"]
    row(tree, "batchnorm0").click()
    assert row(tree, "batchnorm0_running_mean").inner_text().split()[-1] == "state"


def test_a_click_opens_a_level_and_another_closes_it(page: Any) -> None:
    tree = trees(page).nth(0)
    leaf = row(tree, "dense3_weight")
    assert not leaf.is_visible()
    row(tree, "dense3").click()
    assert leaf.is_visible()
    assert leaf.inner_text().split() == ["weight", "(8,", "8)", "float32", "64", "256", "B"]
    row(tree, "dense3").click()
    assert not leaf.is_visible()


def test_the_link_of_a_tie_leads_to_its_leaf_and_opens_what_hides_it(page: Any) -> None:
    tree = trees(page).nth(0)
    target = row(tree, "dense1_weight")
    assert not target.is_visible()
    row(tree, "dense32").click()
    link = row(tree, "dense32_weight").locator("a")
    assert link.inner_text() == "dense1_weight"
    link.click()
    page.wait_for_function("document.querySelector('.paramtree :target') !== null")
    assert target.is_visible()
    assert target.evaluate("row => row.matches(':target')")
    box = target.bounding_box()
    assert -1 <= box["y"] <= 900


def test_statistics_stand_beside_the_leaves(page: Any) -> None:
    tree = trees(page).nth(1)
    open_all(tree)
    assert "1 NaN" in row(tree, "dense0_bias").inner_text()
    assert tree.locator("svg path").count() == 70
    cells = row(tree, "batchnorm0_gamma").locator("xpath=span").all_inner_texts()
    assert cells[5:10] == ["1", "0", "1", "1", "0%"]


def test_hostile_names_do_nothing(page: Any) -> None:
    tree = trees(page).nth(2)
    assert page.evaluate("window.pwned") is None
    assert page.locator("#pwned").count() == 0
    assert page.dialogs == []
    assert tree.locator("script, img, b b, iframe").count() == 0
    text = tree.inner_text()
    assert "<script>window.pwned = 1<" in text.replace("\n", "")
    assert "gnirts\\u202edesrever" in text
    assert "\\x1b[31m red \\n line" in text
    assert "... (1048576 characters)" in text
    assert len(tree.inner_html()) < 100_000
    assert tree.locator("a").count() == 0
    assert trees(page).nth(3).locator("a").first.inner_text() == "<i>a_w"
    assert trees(page).nth(3).is_visible()


def test_text_can_be_read_on_the_background_of_the_theme(page: Any) -> None:
    ratios = (
        trees(page)
        .nth(1)
        .evaluate(
            """tree => {
            const numbers = color => color.match(/[\\d.]+/g).map(Number);
            const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(
                v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
            ).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            let back = null;
            for (let node = tree; node && !back; node = node.parentElement) {
                const color = numbers(getComputedStyle(node).backgroundColor);
                if (color.length == 3 || color[3] > 0) back = color;
            }
            return [...tree.querySelectorAll('span, b, i, a')].filter(
                cell => cell.innerText && cell.checkVisibility()
            ).map(cell => {
                let opacity = 1;
                for (let node = cell; node !== tree; node = node.parentElement)
                    opacity *= Number(getComputedStyle(node).opacity);
                const color = numbers(getComputedStyle(cell).color).slice(0, 3)
                    .map((v, i) => v * opacity + back[i] * (1 - opacity));
                const [a, b] = [light(color), light(back)];
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
        }"""
        )
    )
    assert len(ratios) > 100
    assert min(ratios) > 4.5  # what WCAG asks of small text


def test_the_background_is_that_of_the_theme(page: Any) -> None:
    from io import BytesIO

    from matplotlib.image import imread

    picture = imread(BytesIO(trees(page).nth(0).screenshot()))
    assert (picture[..., :3].mean() > 0.8) == (page.theme == "light")
    assert (picture[..., :3].mean() < 0.3) == (page.theme == "dark")


def test_ten_thousand_leaves_come_in_groups_that_open(page: Any) -> None:
    tree = trees(page).nth(4)
    assert tree.locator(":scope > details").count() == 100
    group = tree.locator(":scope > details").nth(42)
    group.locator(":scope > summary").click()  # what is far away is not laid out
    text = group.locator(":scope > summary").inner_text()
    assert text.split()[:3] == ["layer4200", "...", "layer4299"]
    level = row(tree, "layer4242")
    level.click()
    assert row(tree, "layer4242_weight").is_visible()


def test_a_report_is_a_table_that_can_be_read(page: Any) -> None:
    table = page.locator(".paramtree-report table").first
    heads = table.locator("th").all_inner_texts()
    assert heads[:3] == ["name", "shape", "mean"]
    assert table.locator("tbody tr").count() == 70


# Columns

HEADS = ["name", "shape", "dtype", "count", "bytes"]
MEASURES = ["mean", "std", "min", "max", "zeros", "min to max"]
ROWS = """tree => [...tree.querySelectorAll('summary, .pt-row')].map(row => ({
    level: row.matches('summary') || row.querySelector('b') !== null,
    right: row.getBoundingClientRect().right,
    cells: [...row.children].map(cell => {
        const box = cell.getBoundingClientRect();
        return {note: cell.matches('.pt-note'), text: cell.innerText, left: box.left, right: box.right,
                top: box.top, height: box.height, cut: cell.scrollWidth > cell.clientWidth,
                title: cell.title};
    }),
}))"""

TEXT_START = """name => {
    const range = document.createRange();
    range.selectNodeContents(name);
    return range.getBoundingClientRect().left;
}"""


def of_four_depths(long: str) -> pt.ParamTree:
    """Returns a tree with leaves, levels, a tie, a state and an empty level at each of four depths."""
    nested: dict[str, Any] = {}
    for size in (3, 40, 500, 6000):
        nested = {
            "weight": jnp.ones((size, size)),
            long: jnp.ones(size),
            "running": jnp.zeros(7),
            "empty": {},
            "copy": jnp.ones((size, size)),
            **({"inner": nested} if nested else {}),
        }
    tree = pt.from_tree(nested, kinds={".*running": "state"})
    depths = ["/".join(["inner"] * depth) for depth in range(4)]
    return pt.tie(tree, {f"{at}/copy".lstrip("/"): f"{at}/weight".lstrip("/") for at in depths})


def shown(browser: Any, html: str, width: int, tmp_path: Path) -> Any:
    file = tmp_path / f"{width}.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:8px">{html}', "utf-8")
    made = browser.new_page(viewport={"width": width, "height": 900})
    made.goto(file.as_uri())
    return made


@pytest.mark.parametrize("width", [400, 900, 1600])
@pytest.mark.parametrize("statistics", [False, True])
def test_columns_are_aligned_at_four_depths(
    browser: Any, tmp_path: Path, width: int, statistics: bool
) -> None:
    long = "a_name_that_is_longer_than_a_narrow_cell_and_" + "longer" * 8
    page = shown(
        browser, pt.show(of_four_depths(long), stats=statistics)._repr_html_(), width, tmp_path
    )
    tree = page.locator(".paramtree")
    open_all(tree)
    rows = tree.evaluate(ROWS)
    heads = [*HEADS, *(MEASURES if statistics else ())]
    edges: dict[str, set[float]] = {}
    for row in rows:
        cells = row["cells"]
        assert all(one["right"] <= other["left"] + 0.1 for one, other in pairwise(cells)), cells
        assert len({round(cell["height"]) for cell in cells if cell["text"]}) <= 1
        assert len({round(cell["left"]) for cell in cells}) == len(cells)
        assert row["right"] >= cells[-1]["right"] - 0.1
        names = ["name", "count", "bytes"] if row["level"] else heads
        for name, cell in zip(names, (c for c in cells if not c["note"]), strict=False):
            start = name in ("name", "shape", "dtype", "min to max")
            edges.setdefault(name, set()).add(round(cell["left" if start else "right"], 1))
            assert name == "name" or not cell["cut"]
            assert not cell["cut"] or long in cell["title"]
        edges.setdefault("note", set()).update(round(c["left"], 1) for c in cells if c["note"])
    assert {name: len(places) for name, places in edges.items()} == {
        **dict.fromkeys(heads, 1),
        "note": 1,
    }
    assert len(rows) == 1 + 4 * 5 + 3
    # The names of a level stand two characters to the right of those of the level around it.
    weights = tree.locator("span[title$=weight]").all()
    starts = [name.evaluate(TEXT_START) for name in weights]
    depths = [name.get_attribute("title").count("inner_") for name in weights]
    by_depth = [starts[depths.index(depth)] for depth in range(4)]
    steps = [other - one for one, other in pairwise(by_depth)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.1) and steps[0] > 5
    page.close()

"""The page in a browser: it fits a phone and a desktop, runs its script, and makes no request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import loftq_cli

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian package: chromium)")
# A window of a desktop browser is at least 500 pixels wide; a frame can be as narrow as a phone.
FRAME = """<body style="margin:0"><iframe srcdoc="{page}" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre><script>
onload = function () {{
  var page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  var cell = page.querySelector("svg.map rect"), box = cell.getBoundingClientRect();
  cell.dispatchEvent(new MouseEvent("click", {{bubbles: true}}));
  var wide = Array.from(page.querySelectorAll("section, .card, .tile, h1, h2, h3")).filter(function (item) {{
    return item.getBoundingClientRect().right > {width} + 1;
  }});
  document.getElementById("found").textContent = JSON.stringify({{
    scroll: root.scrollWidth, outside: wide.length, hint: page.getElementById("hint").textContent,
    cell: [box.width, box.height], card: page.querySelectorAll(".card").length,
    requests: page.defaultView.performance.getEntriesByType("resource").length
  }});
}};
</script>"""


def chromium(*words: str) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([BROWSER or "", *flags, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    for bits in (2, 4):
        loftq_cli.quantize(random_llama, output=folder / f"{bits}-bits", bits=bits, rank=4, iters=1)
    return loftq_cli.report([folder / "2-bits", folder / "4-bits"], output=folder / "page.html")


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_window(width: int, page: Path, tmp_path: Path) -> None:
    content = page.read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frame.html").write_text(FRAME.format(page=content, width=width), encoding="utf-8")
    shown = chromium("--window-size=1300,1000", "--dump-dom", (tmp_path / "frame.html").as_uri())
    match = re.search(r'<pre id="found">(.*?)</pre>', shown)
    assert match is not None
    found = json.loads(match[1])
    assert found["scroll"] <= width and found["outside"] == 0 and found["requests"] == 0
    assert "plain" in found["hint"] and "kept" in found["hint"]  # so the script passed the page's own policy
    assert found["cell"][0] >= 10 and found["cell"][1] >= 6 and found["card"] > 10


@pytest.mark.parametrize("width", [500, 1200])
def test_a_screenshot(width: int, page: Path, tmp_path: Path) -> None:
    chromium(f"--window-size={width},1500", f"--screenshot={tmp_path / 'page.png'}", page.as_uri())
    assert (tmp_path / "page.png").stat().st_size > 30_000


def test_it_prints(page: Path, tmp_path: Path) -> None:
    chromium(f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", page.as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")

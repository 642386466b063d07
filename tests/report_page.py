"""A page in a headless Chromium: what it logs and requests, and how wide it gets."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

PHONE = 390
SECONDS = 60
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# a window is 500 pixels wide at least, a frame in it is not
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe width={width} height=900
style="border:0" srcdoc="{page}"></iframe><pre id=found></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  // what is folded must fit as well
  page.querySelectorAll("details").forEach(each => each.open = true);
  const inside = each => each.parentElement.closest(".scroll, svg");
  const wide = [...page.querySelectorAll("body *")].filter(
    each => each.getBoundingClientRect().right > root.clientWidth + 1 && !inside(each));
  const charts = [...page.querySelectorAll("svg")].map(each => each.getBoundingClientRect());
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth, scrolls: root.scrollWidth, charts: charts.length,
    empty: charts.filter(box => box.width < 200 || box.height < 50).length,
    wide: wide.slice(0, 5).map(each => each.outerHTML.slice(0, 120)),
    captions: [...page.querySelectorAll("caption")].filter(
      each => each.offsetWidth > each.closest(".scroll").clientWidth + 1).length,
    cut: [...page.querySelectorAll(".scroll")].filter(
      each => each.scrollWidth > each.clientWidth + 1).map(
      each => each.querySelector("caption").textContent),
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    requests: view.performance.getEntriesByType("resource").map(each => each.name)
      .filter(name => !name.startsWith("data:")),
  }});
}};
</script>"""


def browser() -> str | None:
    """The Chromium of this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def in_a_browser(page: str, place: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """Widths, charts, requests and console errors of a page in a frame of `width` pixels."""
    scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
    frame = place / f"frame-{width}.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page)), "utf-8")
    done = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--hide-scrollbars", scheme,
            "--disable-background-networking", "--enable-logging=stderr", "--v=0",
            f"--user-data-dir={place / 'profile'}", f"--window-size={max(width, 500)},900",
            "--virtual-time-budget=5000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    errors = re.findall(r"CONSOLE.*", done.stderr)
    return json.loads(html.unescape(found[1])) | {"errors": errors}

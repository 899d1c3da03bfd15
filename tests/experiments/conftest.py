"""A real browser for pages, where the machine has one."""

import re
import shutil
import subprocess
from types import SimpleNamespace

import matplotlib.image
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def browser(tmp_path):
    """Runs headless Chromium on a page framed as a phone or a desk would show it."""
    if CHROMIUM is None:
        pytest.skip("no chromium and no google-chrome on this machine")

    def run(html, *options, width=390, height=1200):
        # A window is never narrower than 500 pixels, a frame is as narrow as it is told.
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        (tmp_path / "frame.html").write_text(
            "<!DOCTYPE html><title></title><body style='margin:0'><script>"
            "onmessage = event => { document.title = event.data }</script>"
            f"<iframe src='page.html' style='border:0;width:{width}px;height:{height}px'></iframe>"
        )
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"),
                *(f"--window-size={max(width, 500)},{height}", *options),
                (tmp_path / "frame.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def screenshot(html, scheme, **size):
        path = tmp_path / f"{scheme}.png"
        preferred = {"dark": 0, "light": 1}[scheme]
        options = f"--screenshot={path}", f"--blink-settings=preferredColorScheme={preferred}"
        run(html, *options, **size)
        return matplotlib.image.imread(path)[..., :3]

    def scroll_width(html, **size):
        measure = (
            "<script>onload = () => "
            "parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
        )
        dumped = run(html.replace("</body>", measure), "--dump-dom", **size)
        return int(re.search(r"<title>(\d+)</title>", dumped)[1])

    return SimpleNamespace(screenshot=screenshot, scroll_width=scroll_width)

import json
import re
import shutil
import subprocess

import pytest

from corenas_tool_report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]

OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic", "--disable-extensions"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--virtual-time-budget=5000"),
    "--dump-dom",
]
FRAMES = """<!DOCTYPE html><body>
<iframe id="phone" src="report.html" width="390" height="900"></iframe>
<iframe id="desk" src="report.html" width="1280" height="900"></iframe>
<pre id="seen"></pre>
<script>
addEventListener("load", () => setTimeout(() => {
  const seen = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const select = page.querySelector("select");
    const before = page.querySelector("#trials .xtitle, #fronts .xtitle").textContent;
    select.value = "1";
    select.dispatchEvent(new Event("change"));
    seen[frame.id] = {
      wide: Math.max(root.scrollWidth, page.body.scrollWidth), room: root.clientWidth,
      plots: page.querySelectorAll(".plot").length, drawn: page.querySelectorAll(".plot svg.main-svg").length,
      points: page.querySelectorAll(".plot .scatterlayer .point").length, titles: [before],
      overflowing: [...page.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, pre, .plot, .unseen")
        && e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.tagName + "." + e.className),
    };
    seen[frame.id].titles.push(page.querySelector("#trials .xtitle, #fronts .xtitle").textContent);
  }
  document.getElementById("seen").textContent = JSON.stringify(seen);
}, 1000));
</script>"""


def visit(page, tmp_path):
    """Open a page in a headless browser. Returns the document as it then is, and the addresses that it asked for."""
    log = tmp_path / "net.json"
    command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    text = log.read_text(errors="replace").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("}") else text + "]}")["events"]
    requests = [event["params"] for event in events if "initiator" in event.get("params", {})]
    # The browser itself calls home even where it is told not to: what no page has asked for has no origin.
    asked = {request["url"] for request in requests if request["initiator"] != "not an origin"}
    return done.stdout, {url for url in asked if url.split(":")[0] not in ("file", "data", "blob", "about")}


def test_a_page_that_asks_for_something_is_found_out(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<img src='http://pixel.invalid/a.png'><script src='https://cdn.invalid/b.js'></script>")
    assert visit(page, tmp_path)[1] == {"http://pixel.invalid/a.png", "https://cdn.invalid/b.js"}


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_browser_draws_the_plots_and_asks_for_nothing(run_writer, tmp_path, kind):
    folders = [run_writer("a"), *([run_writer("b", seed=1)] if kind == "comparison" else [])]
    write_report(folders, tmp_path / "report.html")
    (tmp_path / "frames.html").write_text(FRAMES)
    document, asked = visit(tmp_path / "frames.html", tmp_path)
    assert not asked
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', document, re.S)[1])
    for frame in seen.values():
        assert frame["wide"] <= frame["room"]
        assert not frame["overflowing"]
        assert frame["drawn"] >= frame["plots"] == {"run": 3, "comparison": 1}[kind]
        assert frame["points"] > {"run": 100, "comparison": 5}[kind]
        assert frame["titles"] == ["flops", "params"]

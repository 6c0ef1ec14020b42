"""report.html in a real browser: its charts are drawn, and nothing is fetched."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from hflit.cli.main import main
from tests import stand_ins

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--window-size=1000,4000"),
)
BLUE = (31, 119, 180)  # the first line of a chart
MEASURE = """<script>
addEventListener("load", () => {
const charts = [...document.querySelectorAll("svg")].map(svg => {
  const {x, y, width, height} = svg.getBoundingClientRect();
  const lines = [...svg.querySelectorAll("path")].filter(p => p.getTotalLength() > 0).length;
  return {x, y, width, height, lines};
});
const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
document.body.innerHTML = "MEASURED" + JSON.stringify({charts, fetched}) + "END";
});
</script>"""


def browse(tmp_path, *words):
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/browser", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shutil.rmtree(tmp_path / "browser")
    return done.stdout


def measured(tmp_path, text):
    """What the browser drew and fetched of a page, without the policy that lets no script run."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{MEASURE}</body>")
    (tmp_path / "measured.html").write_text(text)
    dumped = browse(tmp_path, "--dump-dom", f"file://{tmp_path}/measured.html")
    return json.loads(re.search(r"MEASURED(.*)END", dumped)[1])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; .ci/run installs it")
def test_charts_are_drawn_and_nothing_is_fetched(tmp_path):
    stand_ins.build(tmp_path, "sentence-transformers/all-MiniLM-L6-v2")
    run = ["--config", "configs/text_classification.yaml", "--args.output_dir", "out"]
    steps = ["--args.max_steps", "40", "--args.logging_steps", "5", "--args.eval_steps", "10"]
    assert main(["fit", *run, *steps, "--args.eval_strategy", "steps"]) == 0
    assert main(["report", "--model", "out"]) == 0
    page = tmp_path / "out" / "report.html"

    picture = tmp_path / "page.png"
    browse(tmp_path, f"--screenshot={picture}", f"file://{page}")
    found = measured(tmp_path, page.read_text())
    assert found["fetched"] == []
    charts = found["charts"]
    assert len(charts) == 2
    shown = Image.open(picture).convert("RGB")
    image = '<img src="http://127.0.0.1:9/x.png">'  # so it would be noticed
    assert measured(tmp_path, page.read_text().replace("<h1>", f"{image}<h1>"))["fetched"]
    for chart in charts:
        assert chart["lines"] > 10
        assert chart["width"] > 300
        assert chart["height"] > 200
        box = [chart["x"], chart["y"], chart["x"] + chart["width"], chart["y"] + chart["height"]]
        colors = {color for _, color in shown.crop(box).getcolors(maxcolors=1 << 20)}
        assert any(_near(color, BLUE) for color in colors)


def _near(color, other):
    # The histogram is half transparent: blue over white.
    mixed = tuple((each + 255) // 2 for each in other)
    return any(
        all(abs(a - b) < 12 for a, b in zip(color, each, strict=True)) for each in (other, mixed)
    )

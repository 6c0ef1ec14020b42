"""The site builds without a warning, and its pages fetch nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_site_builds_and_fetches_nothing(tmp_path):
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = list(site.rglob("*.html"))
    written = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.ipynb")]
    assert len(pages) >= len(written)
    fetched = re.compile(r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="?(?:https?:)?//[^" >]+')
    for file in [*pages, *site.rglob("*.css")]:
        text = file.read_text(encoding="utf-8")
        assert not fetched.findall(text), file
        assert not re.findall(r"url\(\"?https?://", text), file

    called = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("generation_num_beams", "TokenDetection", "cheapest_cuts"):
        assert name in called
    shown = (site / "examples" / "train_labels.html").read_text(encoding="utf-8")
    assert "Pearson before" in shown  # printed by the notebook

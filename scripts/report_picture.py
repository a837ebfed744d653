"""The picture of a report in README.md: the top of a run's page in both colour schemes, by headless Chromium.

The committed one shows the run of scripts/quickstart.sh:

    python scripts/report_picture.py runs/quickstart
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from chromium import Chromium

from posttrain.report import write_report

FOLDER = Path(__file__).resolve().parents[1] / "posttrain" / "report"
WIDTH, HEIGHT = 1100, 938


def take(run: Path, folder: Path = FOLDER) -> list[Path]:
    """Write example-light.png and example-dark.png into ``folder`` and return their paths."""
    files = []
    with tempfile.TemporaryDirectory() as scratch, Chromium() as browser:
        page = write_report(run, Path(scratch) / "report.html")
        for scheme in ("light", "dark"):
            browser.open(page, width=WIDTH, scheme=scheme)
            file = folder / f"example-{scheme}.png"
            file.write_bytes(browser.picture(height=HEIGHT))
            files.append(file)
    return files


if __name__ == "__main__":
    for written in take(Path(sys.argv[1])):
        print(written, written.stat().st_size // 1024, "KiB")

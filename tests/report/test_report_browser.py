"""The page in a real browser: it shows its numbers and asks nothing of the network."""

import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from report_runs import make_run

from posttrain.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
)


class Proxy:
    """Takes every connection of the browser and remembers the first line that was sent."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(4096).decode(errors="replace").split("\r\n")[0])
                connection.sendall(
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )


def dump(file: Path, folder: Path) -> tuple[str, list[str]]:
    """Return the rendered document and what the page asked of the network."""
    proxy = Proxy()
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-extensions",
        "--disable-default-apps", f"--user-data-dir={folder / 'profile'}", "--proxy-bypass-list=<-loopback>",
        f"--proxy-server=http://127.0.0.1:{proxy.port}", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, timeout=120, check=True)
    proxy.socket.close()
    return result.stdout.decode(), [line for line in proxy.requests if "example.invalid" in line]


def test_a_browser_shows_the_numbers_and_asks_for_nothing(tmp_path: Path) -> None:
    out = write_report(make_run(tmp_path / "run"))
    dom, requests = dump(out, tmp_path)
    assert requests == []
    assert "Held-out pass@1 went from 0.312 to 0.750: +0.438" in dom
    assert "&lt;script&gt;alert('x')&lt;/script&gt;&lt;img src=http://example.invalid/a.png" in dom
    assert dom.count("<svg") > 8
    assert "shift_mean" in dom


def test_the_watch_on_the_network_works(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<p>x</p><img src='http://example.invalid/a.png'>")
    _, requests = dump(file, tmp_path)
    assert requests == ["GET http://example.invalid/a.png HTTP/1.1"]


def test_the_policy_stops_what_escaping_would_let_through(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "run")).read_text()
    assert "<main>" in html
    attack = (
        "<main><img src='http://example.invalid/a.png'><p id=probe>before</p>"
        "<script>probe.textContent = 'script ran'</script>"
    )
    (tmp_path / "attack.html").write_text(html.replace("<main>", attack))
    dom, requests = dump(tmp_path / "attack.html", tmp_path)
    assert requests == []
    assert '<p id="probe">before</p>' in dom

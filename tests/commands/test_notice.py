"""The notice of preemption, from a metadata server that behaves as Compute Engine's is documented to."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import programs
import pytest
from conftest import main_env

from jax_resnet.commands import notice

WAITING = """
import time
from jax_resnet.commands.notice import watch
watch()
print("began", flush=True)
time.sleep(600)
"""


class Metadata(ThreadingHTTPServer):
    """Answers instance/preempted as documented: another etag than today's at once, else at a change or in time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.value, self.changed = "FALSE", threading.Condition()
        self.broken = 0  # requests that get no sensible answer
        self.seen: list[dict[str, list[str]]] = []
        self.host = f"127.0.0.1:{self.server_port}"

    def etag(self) -> str:
        return f"etag-of-{self.value}"

    def change(self) -> None:
        with self.changed:
            self.value = "TRUE"
            self.changed.notify_all()


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        url, server = urlsplit(self.path), self.server
        asked = parse_qs(url.query)
        server.seen.append(asked)
        if server.broken:
            server.broken -= 1
            if server.broken % 2:
                self.connection.close()
            else:
                self.send_error(503)
            return
        if url.path != "/computeMetadata/v1/instance/preempted" or self.headers["Metadata-Flavor"] != "Google":
            self.send_error(403)
            return
        with server.changed:
            if asked["wait_for_change"] == ["true"] and asked["last_etag"] == [server.etag()]:
                server.changed.wait(float(asked["timeout_sec"][0]))
        self.send_response(200)
        self.send_header("ETag", server.etag())
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(server.value.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def watching(host: str) -> subprocess.Popen[str]:
    environment = main_env() | {"GCE_METADATA_HOST": host, "http_proxy": "http://127.0.0.1:9"}
    process = programs.start([sys.executable, "-c", WAITING], env=environment)
    process.stdout.readline()
    return process


def test_a_notice_becomes_a_sigterm(metadata: Metadata) -> None:
    process = watching(metadata.host)
    programs.until(lambda: len(metadata.seen) == 2, process)  # the second hangs until there is news
    assert process.poll() is None
    assert [asked["last_etag"] for asked in metadata.seen] == [["0"], ["etag-of-FALSE"]]
    metadata.change()
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert stderr.strip() == "this machine is being preempted"


def test_a_notice_from_before_the_start_counts(metadata: Metadata) -> None:
    metadata.change()
    process = watching(metadata.host)
    assert process.wait() == -signal.SIGTERM
    assert len(metadata.seen) == 1


def test_a_server_that_fails_is_asked_again_ever_more_seldom(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    metadata.value, metadata.broken = "TRUE", 8
    notice._watch(metadata.host)
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert capfd.readouterr().err.strip() == "this machine is being preempted"


def test_the_answer_to_a_timeout_is_no_notice(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "HANG_SECONDS", 0.05)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            metadata.change()

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    notice._watch(metadata.host)
    assert pauses == [1, 1, 1]
    assert len(metadata.seen) == 4


@pytest.mark.parametrize(
    ("variable", "product", "host"),
    [
        (None, None, None),
        (None, "Standard PC (Q35 + ICH9, 2009)\n", None),
        (None, "Google Compute Engine\n", "metadata.google.internal"),
        ("10.0.0.1:80", None, "10.0.0.1:80"),
    ],
)
def test_watches_on_compute_engine_alone_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, product: str | None, host: str | None
) -> None:
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    if variable:
        monkeypatch.setenv("GCE_METADATA_HOST", variable)
    if product:
        (tmp_path / "product_name").write_text(product)
    monkeypatch.setattr(notice, "PRODUCT", tmp_path / "product_name")
    hosts: list[str] = []
    over = threading.Event()
    monkeypatch.setattr(notice, "_watch", lambda host: (hosts.append(host), over.wait()))
    notice.watch()
    notice.watch()
    over.set()
    for thread in threading.enumerate():
        if thread.name == notice.THREAD:
            thread.join()
    assert hosts == ([host] if host else [])

"""Watch for the cloud's notice that this machine is about to be preempted."""

import contextlib
import os
import signal
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

THREAD = "preemption notice"
PRODUCT = Path("/sys/class/dmi/id/product_name")
# After so long the server answers even if nothing has changed.
HANG_SECONDS = 60


def watch() -> None:
    """Send this process SIGTERM when Google Compute Engine announces its preemption, 30 s before.

    Elsewhere nothing happens. Maintenance, announced up to an hour before, is no reason to stop yet:
    a machine that is shut down for it sends SIGTERM itself.
    """
    if _host() and not any(thread.name == THREAD for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(_host(),), name=THREAD, daemon=True).start()


def _host() -> str | None:
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with contextlib.suppress(OSError):
        if "Google Compute Engine" in PRODUCT.read_text():
            return "metadata.google.internal"
    return None


def _watch(host: str) -> None:
    # The server is on this machine, behind no proxy.
    opener = build_opener(ProxyHandler({}))
    etag = "0"
    pause = 1.0  # seconds
    while True:
        # The server answers at once if its etag is another.
        query = f"wait_for_change=true&last_etag={etag}&timeout_sec={HANG_SECONDS}"
        url = f"http://{host}/computeMetadata/v1/instance/preempted?{query}"
        try:
            request = Request(url, headers={"Metadata-Flavor": "Google"})
            with opener.open(request, timeout=2 * HANG_SECONDS) as answer:
                preempted = answer.read().strip() == b"TRUE"
                etag = answer.headers.get("ETag", "0")
                pause = 1.0
        # The run matters more than the notice.
        except (OSError, HTTPException, ValueError):
            preempted = False
            pause = min(2 * pause, 60.0)
        if preempted:
            print("\nthis machine is being preempted", file=sys.stderr, flush=True)
            return os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)

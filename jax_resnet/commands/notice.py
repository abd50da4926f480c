"""The cloud's notice that this machine is about to be taken away."""

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
HANGS = 60  # seconds after which the server answers even if nothing has changed


def watch() -> None:
    """On Google Compute Engine: has this process get SIGTERM when its preemption is announced, 30 seconds ahead.

    Elsewhere nothing happens. Maintenance, announced up to an hour ahead, is no reason to stop yet: a machine that is
    shut down for it sends SIGTERM itself.
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
    opener, etag, pause = build_opener(ProxyHandler({})), "0", 1.0  # it is on this machine, behind no proxy
    while True:
        query = f"wait_for_change=true&last_etag={etag}&timeout_sec={HANGS}"  # another etag is answered at once
        url = f"http://{host}/computeMetadata/v1/instance/preempted?{query}"
        try:
            with opener.open(Request(url, headers={"Metadata-Flavor": "Google"}), timeout=2 * HANGS) as answer:
                preempted, etag, pause = answer.read().strip() == b"TRUE", answer.headers.get("ETag", "0"), 1.0
        except (OSError, HTTPException, ValueError):  # the run matters more than the notice
            preempted, pause = False, min(2 * pause, 60.0)
        if preempted:
            print("\nthis machine is being preempted", file=sys.stderr, flush=True)
            return os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)

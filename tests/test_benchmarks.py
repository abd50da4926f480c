"""Readings in turn count what a process and its children use, and nothing between; the input benchmark runs."""

import json
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import programs
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from interleaved import Process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Batches of 10 that cost 20 ms of a child's time each, and are counted in a file.
WORKER = """
import multiprocessing, sys, time
from interleaved import serve

def work(to):
    while True:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        open(sys.argv[1], "a").write("x")
        to.send(None)

def start():
    ours, theirs = multiprocessing.Pipe(False)
    multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True).start()
    while True:
        yield ours.recv()

serve(start, 10, 0.6, 1)
"""


def test_time_of_children_counts_and_all_of_them_stand_still_between_readings(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    made = tmp_path / "made"
    process = Process([sys.executable, "-c", WORKER, str(made)], tmp_path / "log")
    try:
        before = made.stat().st_size
        time.sleep(0.5)
        assert made.stat().st_size == before
        for _ in range(3):
            process.measure()
    finally:
        process.kill()
    assert made.stat().st_size > before
    assert np.median(process.rates("cpu_s")) == pytest.approx(10 / 0.02, rel=0.5)


def test_a_process_says_what_it_lacks_and_a_fault_is_shown(tmp_path):
    start = "sys.path.append('{}'); from interleaved import serve; serve(lambda: __import__('{}'), 1, 1, 1)"
    lacks = Process(
        [sys.executable, "-c", "import sys; " + start.format(ROOT / "benchmarks", "nought")], tmp_path / "a"
    )
    assert lacks.missing == "No module named 'nought'"
    with pytest.raises(SystemExit, match=r"(?s)b: .*not an iterator"):
        Process([sys.executable, "-c", "import sys; " + start.format(ROOT / "benchmarks", "json")], tmp_path / "b")


def test_the_input_benchmark_measures_our_rows(tmp_path: Path):
    photos, rng = tmp_path / "photos" / "deep", np.random.default_rng(0)
    photos.mkdir(parents=True)
    for i in range(6):
        image = cv2.imencode(".jpg", rng.integers(0, 256, (40, 50 + i, 3), np.uint8))[1]
        (photos / f"{i}.JPEG").write_bytes(image.tobytes())
    command = [sys.executable, str(ROOT / "benchmarks" / "input.py"), f"--data={photos.parent}", "--rounds=2"]
    command += [
        "--seconds=0.1",
        "--threads=1",
        f"--json={tmp_path / 'out.json'}",
        "--rows",
        "decoder",
        "files",
        "cifar_host",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    run = programs.run(command, env=env)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["decoder", "files", "cifar_host"]
    for row in report["rows"]:
        assert len(row["readings"]) == 2
        assert row["images_per_cpu_second"] > 0 < row["images_per_second"]
        assert row["name"] in run.stdout
    assert {"date", "machine", "cores", "threads", "versions", "left_out"} <= report.keys()
    assert list(report["ratios"]) == ["files / decoder"]

"""The input pipeline beside its peers: images for each second of CPU time, and for each second.

    python benchmarks/input.py --data FOLDER [--rows NAME …] [--rounds 5] [--seconds 3] [--threads N] [--json FILE]

Needs:    Linux; for the peers: pip install tensorflow torch torchvision   (a row without its packages is left out)
FOLDER holds JPEGs, at any depth; what is made of them goes to a temporary folder. All but cifar… make random rectangles
of 224 × 224 pixels. Ours but cifar_host end on the device, here the CPU; theirs (input_peers.py) as arrays on the host.

Each row is a process that stands still while another is measured: row after row, round after round, so that what else
the machine does hits all alike. Batches that are ready when a process goes on do not count.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from input_peers import AREA, RATIO, SIZE, cifar_tf_data, tf_data, torchvision_loader
from interleaved import CORES, Process, in_turn, machine, serve

PACKAGES = ("jax", "grain", "simplejpeg", "opencv-python-headless", "tensorflow", "torch", "torchvision")


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(name: str, batch: int, threads: int, on_host: bool = False, **changes: Any) -> Iterator[Any]:
    """What training reads of a dataset, or only its making on the host; `changes` are to `config.data`."""
    from jax_resnet.config import default
    from jax_resnet.data.batches import train_batch
    from jax_resnet.data.loader import train_batches
    from jax_resnet.data.sampling import Phase
    from jax_resnet.data.sources import open_dataset
    from jax_resnet.runtime.mesh import batch_sharding, data_mesh

    c = default().data
    c.image.update({"crop": "pad"} if name.startswith("npz:") else {"size": SIZE})
    c.update({"name": name, "threads": threads, "workers": 0} | changes)
    split, rows, phase = open_dataset(c).train, np.arange(batch), Phase(0, 10**9, None, batch, 0)
    if on_host:
        return (train_batch(split, i, seed=0, phase=phase, rows=rows) for i in itertools.count())
    return train_batches(
        split,
        c,
        start=0,
        stop=10**9,
        seed=0,
        phases=(phase,),
        sharding=batch_sharding(data_mesh()),
        report=print,
    )


def decoder(files: Path, batch: int, threads: int, regions: bool = False) -> Iterator[int]:
    """Nothing but decoding, of bytes in memory: whole images, or only rectangles as random crops would have them."""
    import simplejpeg

    from jax_resnet.data.image import decoders, images
    from jax_resnet.errors import UserError

    try:
        name = decoders.choose_decoder("turbojpeg" if regions else "simplejpeg")
    except UserError as e:
        raise ImportError(str(e)) from None
    encoded = [file.read_bytes() for file in sorted(files.glob("train/*/*"))]
    random = np.random.default_rng(0).uniform(size=(len(encoded), 4)).tolist()

    def rectangle(height: int, width: int, area: float, ratio: float, y: float, x: float) -> tuple[int, int, int, int]:
        area, ratio = height * width * (AREA[0] + area * (AREA[1] - AREA[0])), RATIO[0] ** (1 - 2 * ratio)
        h, w = min(height, round((area / ratio) ** 0.5)), min(width, round((area * ratio) ** 0.5))
        return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w

    def decode(number: int) -> int:
        for i in range(number * batch, (number + 1) * batch):
            data, drawn = encoded[i % len(encoded)], random[i % len(encoded)]
            if regions:
                images.decode(data, 3, lambda height, width, drawn=drawn: rectangle(height, width, *drawn), name)
            else:
                simplejpeg.decode_jpeg(data, "RGB")
        return batch

    pool, waiting = ThreadPoolExecutor(threads), deque[Future[int]]()
    for number in itertools.count():
        waiting.append(pool.submit(decode, number))
        if len(waiting) > 2 * threads:
            yield waiting.popleft().result()


# ---- the rows --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What is measured: its batches, from the temporary folder and with as many threads or workers as are given."""

    what: str
    batches: Callable[[Path, int, int], Iterator[Any]]
    batch: int = 128


# files/ and small/ hold files; records/ and resized/ are prepared from files/, small/ has the very bytes of resized/.
ROWS = {
    "decoder": Row("simplejpeg alone, whole images", lambda at, b, n: decoder(at / "files", b, n)),
    "decoder_regions": Row("our decoder alone, rectangles", lambda at, b, n: decoder(at / "files", b, n, True)),
    "files": Row("ours, threads, the decoder at hand", lambda at, b, n: ours(f"folder:{at}/files", b, n)),
    "files_simplejpeg": Row(
        "ours, simplejpeg", lambda at, b, n: ours(f"folder:{at}/files", b, n, image={"decoder": "simplejpeg"})
    ),
    "files_workers": Row("ours, worker processes", lambda at, b, n: ours(f"folder:{at}/files", b, 1, workers=n)),
    "records": Row("ours, prepared", lambda at, b, n: ours(f"prepared:{at}/records", b, n)),
    "files_flax": Row("tf.data as in Flax's example", lambda at, b, n: tf_data(at / "files", b, n)),
    "files_tuned": Row("tf.data, tuned", lambda at, b, n: tf_data(at / "files", b, n, tuned=True)),
    "files_torch": Row("torchvision", lambda at, b, n: torchvision_loader(at / "files", b, n)),
    "resized": Row("ours, prepared, short side 256", lambda at, b, n: ours(f"prepared:{at}/resized", b, n)),
    "resized_flax": Row("Flax's tf.data on the same", lambda at, b, n: tf_data(at / "small", b, n)),
    "resized_tuned": Row("tuned tf.data on the same", lambda at, b, n: tf_data(at / "small", b, n, tuned=True)),
    "cifar": Row("ours: 32 × 32, from memory", lambda at, b, n: ours(f"npz:{at}/cifar.npz", b, n), 1024),
    "cifar_host": Row("ours, host alone", lambda at, b, n: ours(f"npz:{at}/cifar.npz", b, n, on_host=True), 1024),
    "cifar_gathered": Row("tf.data, the same", lambda at, b, n: cifar_tf_data(at / "cifar.npz", b, False), 1024),
    "cifar_augmented": Row(
        "tf.data, shift, flip, float32", lambda at, b, n: cifar_tf_data(at / "cifar.npz", b, True), 1024
    ),
}
RATIOS = (
    ("files", "decoder"),
    ("files_simplejpeg", "decoder"),
    ("files", "decoder_regions"),
    ("files_simplejpeg", "files_flax"),
    ("files", "files_flax"),
    ("resized", "files_flax"),
    ("resized", "resized_flax"),
    ("cifar_host", "cifar_gathered"),
)


def make_data(at: Path, data: Path, names: list[str]) -> None:
    """Fills the temporary folder with what the rows read."""
    files = sorted(f for f in data.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"{data}: no JPEGs in it")
    for part, some in (("train", files), ("val", files[:1])):
        (at / "files" / part / "photos").mkdir(parents=True)
        for i, file in enumerate(some):
            (at / "files" / part / "photos" / f"{i:07d}.jpg").symlink_to(file.resolve())
    command = [sys.executable, "-m", "jax_resnet", "prepare", str(at / "files")]
    if "records" in names:
        subprocess.run([*command, str(at / "records")], check=True, stdout=subprocess.DEVNULL)
    if any("resized" in name for name in names):
        subprocess.run([*command, str(at / "resized"), "--resize=256"], check=True, stdout=subprocess.DEVNULL)
        import tensorflow_datasets as tfds

        encoded = {"image": tfds.decode.SkipDecoding()}
        records = tfds.builder_from_directory(at / "resized").as_data_source("train", decoders=encoded)
        (at / "small" / "train" / "photos").mkdir(parents=True)
        for i in range(len(records)):
            (at / "small" / "train" / "photos" / f"{i:07d}.jpg").write_bytes(records[i]["image"])
    if any("cifar" in name for name in names):
        x, y = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8), np.arange(50_000) % 10
        np.savez(at / "cifar.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])


# ---- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures, then prints the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of a reading")
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        row = ROWS[args.serve]
        return serve(lambda: row.batches(args.data, row.batch, args.threads), row.batch, args.seconds, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.data, args.rows)
        command = [
            sys.executable,
            __file__,
            f"--data={folder}",
            f"--seconds={args.seconds}",
            f"--threads={args.threads}",
        ]
        measured, left_out = in_turn(args.rows, command, args.rounds, Path(folder))
    report = machine(PACKAGES) | {
        "threads": args.threads,
        "seconds": args.seconds,
        "rows": [row_report(name, of) for name, of in measured.items()],
        "ratios": {f"{a} / {b}": ratio(measured[a], measured[b]) for a, b in RATIOS if {a, b} <= measured.keys()},
        "left_out": left_out,
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def row_report(name: str, of: Process) -> dict[str, Any]:
    """Medians of the readings, and the readings."""
    a_cpu_second, a_second = (statistics.median(of.rates(unit)) for unit in ("cpu_s", "s"))
    medians = {"images_per_cpu_second": a_cpu_second, "images_per_second": a_second}
    return {"name": name, "what": ROWS[name].what, **medians, "readings": of.readings}


def ratio(a: Process, b: Process) -> float:
    """How many times the images for a CPU second, the median over rounds."""
    return statistics.median(x / y for x, y in zip(a.rates("cpu_s"), b.rates("cpu_s"), strict=True))


def show(report: dict[str, Any]) -> None:
    """Prints what --json writes."""
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"{report['machine']}, {report['cores']} cores, {report['threads']} threads, {report['date']}")
    print(f"{'images':<49}{'a CPU-second':>13}{'a second':>11}")
    for row in report["rows"]:
        rates = row["images_per_cpu_second"], row["images_per_second"]
        print(f"{row['name']:<17}{row['what']:<32}{rates[0]:>13,.0f}{rates[1]:>11,.0f}")
    for name, why in report["left_out"].items():
        print(f"{name:<17}left out: {why}")
    for name, ratio in report["ratios"].items():
        print(f"{name:<49}{ratio:>13.2f}")


if __name__ == "__main__":
    main()

"""What training is given, written down: tests/stream.py FOLDER OUT THREADS WORKERS [PROCESS COUNT PORT].

A line of OUT for each step of three epochs: {row of the global batch: digest of its pixels and label}, of the rows that
this process has. Where lines are already, it goes on after them.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jax_resnet.config import default
from jax_resnet.data.loader import train_batches
from jax_resnet.data.sampling import Phase
from jax_resnet.data.sources import open_dataset
from jax_resnet.runtime.mesh import batch_sharding, data_mesh

SEED, BATCH, EPOCHS = 3, 8, 3


def main(folder: str, out: str, threads: int, workers: int, process: int = 0, count: int = 1, port: int = 0) -> None:
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, process)
    c = default().data
    c.update(name=f"folder:{folder}", threads=threads, workers=workers, max_broken=0.2)
    c.image.update(size=16, crop="random_resized", randaugment=(2, 9))
    split = open_dataset(c).train
    done = Path(out).read_text().count("\n") if Path(out).exists() else 0
    steps = -(-EPOCHS * len(split) // BATCH)
    batches = train_batches(split, c, start=done, stop=steps, seed=SEED,
                            phases=(Phase(0, steps, None, BATCH, 0),),
                            sharding=batch_sharding(data_mesh()),
                            report=lambda _, *of: print(*of, flush=True))  # fmt: skip
    with Path(out).open("a", buffering=1) as file:
        for batch in batches:
            rows = {}
            parts = zip(batch["image"].addressable_shards, batch["label"].addressable_shards, strict=True)
            for images, labels in parts:
                first = images.index[0].start or 0
                for i, (image, label) in enumerate(zip(np.asarray(images.data), np.asarray(labels.data), strict=True)):
                    rows[first + i] = hashlib.sha256(image.tobytes() + bytes([label])).hexdigest()[:16]
            file.write(json.dumps(rows) + "\n")
            time.sleep(0.02)  # for a kill to find it at work
    batches.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

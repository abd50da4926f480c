"""A small TFDS dataset: grey images of 8×8 pixels and 10 classes, each image unlike the others."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

SIZES = {"train": 150, "test": 40}


class Squares(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `squares`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        image, label = tfds.features.Image(shape=(8, 8, 1)), tfds.features.ClassLabel(num_classes=10)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (image, label) in enumerate(zip(*arrays(split), strict=True)):
            png = cv2.imencode(".png", image)[1].tobytes()  # an array TFDS would encode with TensorFlow
            yield i, {"image": io.BytesIO(png), "label": int(label)}


def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 [N, 8, 8, 1], and labels [N] of a split, in no order."""
    rng, count = np.random.default_rng(len(split)), SIZES[split]
    return rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8), rng.integers(0, 10, count)


def prepare(folder: Path) -> Path:
    """Prepare the dataset below `folder`; return its own folder."""
    Squares(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "squares" / "1.0.0"

"""scikit-learn's handwritten digits as a TFDS dataset: real images that come with the default packages.

1,797 grey 8×8 digits of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), split 80/20
by class: 1,437 to train, 360 to test. Preparing it takes a second, no network and no TensorFlow.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `digits`: image uint8 [8, 8, 1], label in 0 … 9."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        intensities, labels = load_digits(return_X_y=True)  # 0 … 16, row by row
        images = np.round(intensities.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        train, test, train_labels, test_labels = train_test_split(
            images, labels, test_size=0.2, stratify=labels, random_state=0
        )
        return {
            "train": self._generate_examples(train, train_labels),
            "test": self._generate_examples(test, test_labels),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        import cv2

        # TFDS writes bytes as they are; encoding an array would need TensorFlow.
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = cv2.imencode(".png", image)[1].tobytes()
            yield i, {"image": io.BytesIO(png), "label": int(label)}

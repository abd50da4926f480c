"""scikit-learn's handwritten digits: real images that come with the default packages.

1,797 grey 8×8 digits of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak 1998), split 80/20 by class: 1,437 to train, 360 to test.
"""

import hashlib

import numpy as np

CLASSES = tuple("0123456789")


def load_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Load the images, uint8 [N, 8, 8], and labels, int64 [N], of "train" and "test"."""
    from sklearn import datasets, model_selection  # takes a second to import

    intensities, labels = datasets.load_digits(return_X_y=True)  # 0 … 16, row by row
    images = np.round(intensities.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, test, train_labels, test_labels = model_selection.train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return {"train": _ordered("train", train, train_labels), "test": _ordered("test", test, test_labels)}


def _ordered(split: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order records as TFDS, which gave them before: old runs resume with the same batches."""
    order = sorted(range(len(labels)), key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())
    return images[order], labels[order]

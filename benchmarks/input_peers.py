"""The input pipelines of others, for input.py: iterators of training batches on the host."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE, AREA, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)  # of random-resized crops
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1]


def tf_data(files: Path, batch: int, threads: int, tuned: bool = False) -> Iterator[Any]:
    """tf.data from a TFRecord file.

    As in Flax's example (google/flax, examples/imagenet/input_pipeline.py): decoding of the rectangle alone, bicubic,
    float32 normalised. Or tuned, for the same crops with less work: bytes cached, fast DCT, bilinear, uint8, unordered.
    """
    import tensorflow as tf

    records = files.with_suffix(".tfrecord")
    if not records.exists():
        with tf.io.TFRecordWriter(str(records)) as writer:
            for file in sorted(files.glob("train/*/*")):
                image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[file.read_bytes()]))
                example = tf.train.Example(features=tf.train.Features(feature={"image": image}))
                writer.write(example.SerializeToString())

    def encoded(record: Any) -> Any:
        return tf.io.parse_single_example(record, {"image": tf.io.FixedLenFeature([], tf.string)})["image"]

    def window(data: Any) -> Any:
        shape = tf.image.extract_jpeg_shape(data)
        whole = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, whole, 0.1, aspect_ratio_range=RATIO, area_range=AREA, max_attempts=10
        )
        centred = tf.repeat(tf.cast(tf.reduce_min(shape[:2]) * SIZE / (SIZE + 32), tf.int32), 2)
        found = tf.reduce_any(size[:2] != shape[:2])  # the whole image: no try was a success
        corner = tf.where(found, begin[:2], (shape[:2] - centred + 1) // 2)
        return tf.concat([corner, tf.where(found, size[:2], centred)], 0)

    def preprocess(data: Any) -> Any:
        dct = "INTEGER_FAST" if tuned else ""
        image = tf.image.decode_and_crop_jpeg(data, window(data), channels=3, dct_method=dct)
        image = tf.image.resize(image, [SIZE, SIZE], "bilinear" if tuned else "bicubic")
        if tuned:
            return tf.image.random_flip_left_right(tf.cast(image, tf.uint8))
        return (tf.image.random_flip_left_right(image) - 255 * tf.constant(MEAN)) / (255 * tf.constant(STD))

    def decoded(record: Any) -> Any:
        return preprocess(encoded(record))

    options, parallel = tf.data.Options(), tf.data.AUTOTUNE
    options.threading.private_threadpool_size = threads if tuned else 48
    options.deterministic = not tuned
    ds = tf.data.TFRecordDataset(str(records)).with_options(options)
    if tuned:
        ds = ds.map(encoded).cache().repeat().shuffle(2000).map(preprocess, parallel)
        ds = ds.batch(batch, drop_remainder=True, num_parallel_calls=parallel).prefetch(parallel)
    else:
        ds = ds.repeat().shuffle(2000, seed=0).map(decoded, parallel)
        ds = ds.batch(batch, drop_remainder=True).prefetch(10)
    return ds.as_numpy_iterator()


def cifar_tf_data(arrays: Path, batch: int, augments: bool) -> Iterator[Any]:
    """tf.data over images in memory: as they are, or shifted, flipped and normalised one by one as is usual."""
    import tensorflow as tf

    def augment(image: Any, label: Any) -> tuple[Any, Any]:
        image = tf.image.random_crop(tf.pad(image, [[4, 4], [4, 4], [0, 0]]), [32, 32, 3])
        image = tf.cast(tf.image.random_flip_left_right(image), tf.float32)
        return (image - 255 * tf.constant(MEAN)) / (255 * tf.constant(STD)), label

    with np.load(arrays) as file:
        images, labels = file["x_train"], file["y_train"]
    ds = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images)).repeat()
    if augments:
        ds = ds.map(augment, tf.data.AUTOTUNE)
    return ds.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def torchvision_loader(files: Path, batch: int, threads: int) -> Iterator[Any]:
    """DataLoader over ImageFolder, a worker process for each thread of the others."""
    import torch

    try:
        from torchvision import datasets, transforms
    except RuntimeError as e:  # its operators were built for another torch
        raise ImportError(f"torchvision: {e}") from None
    crop = transforms.RandomResizedCrop(SIZE, AREA, RATIO)
    tensor = transforms.ToTensor(), transforms.Normalize(MEAN, STD)
    chain = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *tensor])
    dataset = datasets.ImageFolder(str(files / "train"), chain)
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    return iter(torch.utils.data.DataLoader(dataset, batch, sampler=endless, num_workers=threads))

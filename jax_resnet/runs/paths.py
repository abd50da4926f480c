"""Files here and in object stores, gs:// and s3://: what reads or writes in a workdir goes through this module.

A path is a `pathlib.Path` of this machine, or for a URL an `epath.Path`, which has the same methods.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from jax_resnet.errors import TransientError, UserError, first_line

AnyPath: TypeAlias = Path | epath.Path
COMMITTED = "commit_success.txt"  # Orbax writes it last, where a folder cannot be renamed at once
BACKENDS = {"gs": "gcsfs", "s3": "s3fs"}  # and the extra that brings each has the scheme's name, gcs and s3
# A store's errors that the same command meets every time: a bucket that is not there, refused or missing credentials.
MISTAKES = (FileNotFoundError, PermissionError, ValueError)
MISTAKEN_TYPES = re.compile("Credential|Auth|RefreshError")  # of botocore and google.auth, which may not be installed


def open_path(path: str | os.PathLike[str]) -> AnyPath:
    """The folder or file that is meant, ~ expanded.

    Raises UserError, which begins with `path`, for a URL that is neither gs:// nor s3://, names no bucket, or needs a
    package that is not installed.
    """
    scheme, url, rest = os.fspath(path).partition("://")
    if not url:
        return Path(path).expanduser()
    if scheme not in BACKENDS:
        raise UserError(f"{path}: must be a folder of this machine or one mounted there, gs://… or s3://…")
    bucket, _, folder = rest.partition("/")
    if not bucket or not folder.strip("/"):
        raise UserError(f"{path}: must name a bucket and a folder in it, {scheme}://BUCKET/FOLDER")
    if importlib.util.find_spec(BACKENDS[scheme]) is None:
        extra = "gcs" if scheme == "gs" else scheme
        raise UserError(f"{path}: to reach {scheme}://, pip install 'jax-resnet-training[{extra}]'")
    import fsspec

    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow, where it is installed, would be loaded to do it
    # Tensorstore writes past fsspec, which would go on showing the listings that it remembers.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    return epath.Path(os.fspath(path))


def is_remote(path: AnyPath) -> bool:
    """Whether it is in an object store: no folders, no renaming, no appending, but a write is whole or not there."""
    return "://" in str(path)


def absolute(path: AnyPath) -> AnyPath:
    """`path` from the root of the file system; a URL as it is."""
    return path if is_remote(path) else path.absolute()


def make_folder(folder: AnyPath) -> None:
    """Makes it and those above it. An object store has none: to ask for one may make a bucket of a mistyped name."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(file: AnyPath, content: bytes) -> None:
    """Writes all of it or nothing, in place of what is there.

    Raises OSError for a local file and UserError for a remote one that cannot be written.
    """
    if is_remote(file):
        with reaching(file, "written"):
            file.write_bytes(content)
        return
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    os.replace(part, file)


def read(file: AnyPath) -> bytes:
    """All of it. Raises FileNotFoundError if it is not there, OSError or (remote) UserError if it cannot be read."""
    with reaching(file, "read"):
        return file.read_bytes()


def names(folder: AnyPath) -> list[str]:
    """What is in it, in no order; nothing if it cannot be read. Raises UserError if an object store cannot be asked."""
    try:
        with reaching(folder, "read"):
            return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def move(path: AnyPath, to: AnyPath) -> None:
    """Renames a folder or file within one file system; `to` must not exist.

    In an object store each object is copied there, by the store itself, and then deleted. A process that dies meanwhile
    leaves both; what marks a checkpoint as whole is copied last and deleted first.

    Raises FileExistsError, FileNotFoundError, or what `write` raises.
    """
    if to.exists():
        raise FileExistsError(17, f"{to} exists")
    if not is_remote(path):
        path.rename(to)
        return
    with reaching(path, "moved"):
        files: Any = _file_system(path)
        found = sorted(files.find(str(path)), key=lambda name: (name.endswith("/" + COMMITTED), name))
        if not found:
            raise FileNotFoundError(2, f"{path} is not there")
        begin = len(str(path).partition("://")[2].rstrip("/"))
        for name in found:
            files.copy(name, str(to).rstrip("/") + name[begin:])
        for name in reversed(found):
            files.rm_file(name)


def _file_system(path: AnyPath) -> Any:
    import fsspec

    return fsspec.filesystem(str(path).partition("://")[0])


@contextlib.contextmanager
def reaching(path: AnyPath, done: str) -> Iterator[None]:
    """Raise UserError where something remote cannot be `done`: "read", "written". Local errors pass as they are.

    So does FileNotFoundError in reading; in writing it means the bucket, for an object needs no folder. The error is a
    TransientError unless it tells of a missing bucket or refused credentials: a store that answers 503 may be back.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # of fsspec, the store's own library and its HTTP client, which have no error in common
        if not is_remote(path) or (isinstance(e, FileNotFoundError) and done == "read"):
            raise
        if isinstance(e, MISTAKES) or MISTAKEN_TYPES.search(type(e).__name__):
            advice = "check the bucket's name and your credentials for it"
            raise UserError(f"{path}: cannot be {done} ({first_line(e)}); {advice}") from None
        raise TransientError(f"{path}: cannot be {done} ({first_line(e)}); the store or the network may be back") from e

"""Read and write files of this machine and of object stores, gs:// and s3://.

All access to a workdir goes through this module. A path is a `pathlib.Path` of this machine, or for
a URL an `epath.Path`, which has the same methods.
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
# Orbax writes this file last, where renaming a folder is not atomic.
COMMITTED = "commit_success.txt"
BACKENDS = {"gs": "gcsfs", "s3": "s3fs"}
# Errors that the same command meets every time: a missing bucket, refused or missing credentials.
MISTAKES = (FileNotFoundError, PermissionError, ValueError)
# Botocore and google.auth define these types, and may not be installed.
MISTAKEN_TYPES = re.compile("Credential|Auth|RefreshError")


def open_path(path: str | os.PathLike[str]) -> AnyPath:
    """Make the path of a folder or file, with ~ expanded, or of a URL.

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

    # Epath would load TensorFlow, where it is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Tensorstore writes without fsspec, whose cached listings would go stale.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    return epath.Path(os.fspath(path))


def is_remote(path: AnyPath) -> bool:
    """Tell whether a path is in an object store: atomic writes, no folders, no renaming."""
    return "://" in str(path)


def absolute(path: AnyPath) -> AnyPath:
    """Make a local path absolute; return a URL as it is."""
    return path if is_remote(path) else path.absolute()


def make_folder(folder: AnyPath) -> None:
    """Make a local folder and its parents. A store might create a mistyped bucket instead."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(file: AnyPath, content: bytes) -> None:
    """Write a file atomically, in place of an existing one.

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
    """Read a file. Raises FileNotFoundError, or else OSError or (remote) UserError."""
    with reaching(file, "read"):
        return file.read_bytes()


def names(folder: AnyPath) -> list[str]:
    """List a folder, none if it cannot be read. Raises UserError for an object store."""
    try:
        with reaching(folder, "read"):
            return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def move(path: AnyPath, to: AnyPath) -> None:
    """Rename a folder or file within one file system; `to` must not exist.

    An object store copies each object and then deletes it. A process that dies meanwhile leaves both;
    the file that marks a checkpoint as complete is copied last and deleted first.

    Raises FileExistsError, FileNotFoundError, or what `write` raises.
    """
    if to.exists():
        raise FileExistsError(17, f"{to} exists")
    if not is_remote(path):
        path.rename(to)
        return
    with reaching(path, "moved"):
        files: Any = _file_system(path)
        objects = sorted(files.find(str(path)), key=lambda name: (name.endswith("/" + COMMITTED), name))
        if not objects:
            raise FileNotFoundError(2, f"{path} is not there")
        begin = len(str(path).partition("://")[2].rstrip("/"))
        for name in objects:
            files.copy(name, str(to).rstrip("/") + name[begin:])
        for name in reversed(objects):
            files.rm_file(name)


def _file_system(path: AnyPath) -> Any:
    import fsspec

    return fsspec.filesystem(str(path).partition("://")[0])


@contextlib.contextmanager
def reaching(path: AnyPath, done: str) -> Iterator[None]:
    """Raise UserError if a remote file cannot be `done`: "read", "written". Local errors pass.

    FileNotFoundError passes too when reading; when writing it means a missing bucket. The error is a
    TransientError unless the bucket is missing or credentials are refused: a store that answers 503
    may be back.
    """
    try:
        yield
    except UserError:
        raise
    # Fsspec, the store's own library and its HTTP client have no error type in common.
    except Exception as e:
        if not is_remote(path) or (isinstance(e, FileNotFoundError) and done == "read"):
            raise
        if isinstance(e, MISTAKES) or MISTAKEN_TYPES.search(type(e).__name__):
            advice = "check the bucket's name and your credentials for it"
            raise UserError(f"{path}: cannot be {done} ({first_line(e)}); {advice}") from None
        raise TransientError(f"{path}: cannot be {done} ({first_line(e)}); the store or the network may be back") from e

"""Teaches Orbax to keep arrays in s3://. Tensorstore, which writes them, has a driver for it, as it has for gs://.

Orbax 0.12 asks for the one of gs:// alone and takes an s3:// for a relative path. Its specification of where arrays are
is made in one function; for s3:// it is made here as if for gs://, and the driver in it exchanged.
"""

import functools
import os
import re
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils


def teach_orbax() -> None:
    """Lets Orbax save and restore arrays under s3://. To call it twice does nothing more."""
    build = tensorstore_utils.build_kvstore_tspec
    if getattr(build, "knows_s3", False):
        return

    @functools.wraps(build)
    def build_kvstore_tspec(directory: str, *args: Any, **kwargs: Any) -> Any:
        bucket_and_path = re.match(r"s3:/+(.*)", directory)  # os.path.normpath leaves one slash
        if not bucket_and_path:
            return build(directory, *args, **kwargs)
        return _exchanged(build(f"gs://{bucket_and_path[1]}", *args, **kwargs))

    build_kvstore_tspec.knows_s3 = True  # type: ignore[attr-defined]
    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def _exchanged(spec: Any) -> Any:
    """`spec` with the driver of s3 wherever it has that of gs."""
    if isinstance(spec, list):
        return [_exchanged(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    spec = {key: _exchanged(value) for key, value in spec.items()}
    return spec | driver() if str(spec.get("driver")).startswith("gcs") else spec


@functools.cache
def driver() -> dict[str, Any]:
    """The driver with the endpoint and region that s3fs has found; tensorstore would not read AWS_ENDPOINT_URL.

    Credentials it looks for where boto does; where the environment has them it would still complain of missing files.
    """
    import s3fs

    files = s3fs.S3FileSystem()
    files.connect()
    spec = {"driver": "s3", "endpoint": files.s3.meta.endpoint_url, "aws_region": files.s3.meta.region_name}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec

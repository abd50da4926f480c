"""Let Orbax keep arrays in s3://, for which tensorstore, which writes them, has a driver.

Orbax 0.12 knows only the driver of gs:// and takes an s3:// URL for a relative path. One function of
Orbax specifies where arrays are; for s3:// it is called as for gs://, and the driver is replaced.
"""

import functools
import os
import re
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils


def teach_orbax() -> None:
    """Let Orbax save and restore arrays under s3://. A second call does nothing."""
    build = tensorstore_utils.build_kvstore_tspec
    if getattr(build, "knows_s3", False):
        return

    @functools.wraps(build)
    def build_kvstore_tspec(directory: str, *args: Any, **kwargs: Any) -> Any:
        # os.path.normpath leaves one slash.
        bucket_and_path = re.match(r"s3:/+(.*)", directory)
        if not bucket_and_path:
            return build(directory, *args, **kwargs)
        return _with_s3_driver(build(f"gs://{bucket_and_path[1]}", *args, **kwargs))

    build_kvstore_tspec.knows_s3 = True  # type: ignore[attr-defined]
    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def _with_s3_driver(spec: Any) -> Any:
    """Replace the driver of gs by that of s3 everywhere in `spec`."""
    if isinstance(spec, list):
        return [_with_s3_driver(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    spec = {key: _with_s3_driver(value) for key, value in spec.items()}
    if str(spec.get("driver")).startswith("gcs"):
        spec |= driver()
    return spec


@functools.cache
def driver() -> dict[str, Any]:
    """Specify tensorstore's driver with the endpoint and region that s3fs uses.

    Tensorstore does not read AWS_ENDPOINT_URL. It looks for credentials where boto does, but warns of
    missing files unless it is told that they are in the environment.
    """
    import s3fs

    files = s3fs.S3FileSystem()
    files.connect()
    spec = {"driver": "s3", "endpoint": files.s3.meta.endpoint_url, "aws_region": files.s3.meta.region_name}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec

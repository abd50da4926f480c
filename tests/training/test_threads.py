"""Several trainings in threads of one program, each in a workdir of its own, as a sweep or a notebook has them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from programs import HANG_SECONDS

from jax_resnet import train
from jax_resnet.commands.checkpoints import inspect
from jax_resnet.config import duration
from jax_resnet.runs.workdir import keeping_compiled


@pytest.mark.parametrize("count", [2, 4])
def test_all_of_them_finish_and_what_they_saved_is_sound(count: int, tiny_config: ConfigDict, tmp_path: Path) -> None:
    """Saving as often as they can, so that saves begin at the same time."""
    tiny_config.train = tiny_config.eval.every = duration(steps=12)
    tiny_config.checkpoint.every = duration(steps=2)
    workdirs = [tmp_path / str(number) for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda workdir: train(tiny_config, workdir), workdirs, timeout=HANG_SECONDS))
    assert [result["step"] for result in results] == [12] * count
    for workdir in workdirs:
        assert [(row["step"], row["sound"]) for row in inspect(workdir, verify=True)] == [(10, True), (12, True)]


@pytest.fixture
def no_place() -> Iterator[None]:
    """Without the compilation cache that the tests share."""
    place = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", place)


@pytest.mark.usefixtures("no_place")
def test_the_first_gives_the_place_of_what_is_compiled_and_the_last_takes_it_away(tmp_path: Path) -> None:
    def state() -> tuple[str | None, float]:
        names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
        place, least = (jax.config.values[name] for name in names)
        return place, least

    before = state()
    first, second = (keeping_compiled(tmp_path / name) for name in ("first", "second"))
    first.__enter__()
    during = state()
    assert during[0] == str(tmp_path / "first" / "compiled")
    second.__enter__()
    assert state() == during
    first.__exit__(None, None, None)  # the second goes on compiling
    assert state() == during
    second.__exit__(None, None, None)
    assert state() == before == (None, before[1])
    with keeping_compiled(tmp_path / "second"):
        assert state()[0] == str(tmp_path / "second" / "compiled")
    assert state() == before

"""Configs that were stored: of this version, of those before it, and of versions to come."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from workdirs import assert_bit_identical, restored

from jax_resnet.commands.average import average
from jax_resnet.config import default, differences, from_json, stored, to_json, validate
from jax_resnet.config.keys import RENAMED, leaves
from jax_resnet.errors import UserError
from jax_resnet.inference.safetensors import export
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.digests import _digest_of_record
from jax_resnet.runs.retention import Keep
from jax_resnet.runs.workdir import read_config, write_json
from jax_resnet.training.evaluate import evaluate_checkpoint
from jax_resnet.training.experiment import build
from jax_resnet.training.loop import train
from jax_resnet.training.pretrained import read_weights
from jax_resnet.training.state import to_fields

VERSION_1 = Path(__file__).parents[1] / "data" / "config_version1.json"  # written by the last commit that wrote them


def version_1(**data: Any) -> dict[str, Any]:
    """Return the stored config of version 1, with changes to its group `data`."""
    values = json.loads(VERSION_1.read_text())
    values["data"] |= data
    return values


def config_of_version_1() -> ConfigDict:
    """Return the config that VERSION_1 was written of, as it is said today."""
    c = tiny.get_config("")
    c.dtype = "float32"
    c.data.name, c.data.mixup = "digits", 0.2
    c.data.image.update({"size": 12, "cutmix": 1.0, "erase": 0.5, "decoder": "simplejpeg"})
    return c


# ---- versions --------------------------------------------------------------------------------------------------------


def test_a_config_of_version_1_is_read_under_the_names_of_today() -> None:
    values = version_1()
    assert "version" not in values
    assert RENAMED.keys() <= {f"data.{name}" for name in values["data"]}
    assert set(RENAMED.values()) <= dict(leaves(default())).keys()
    config = from_json(values)
    validate(config)
    assert config == config_of_version_1()
    assert values == version_1()  # what was stored stays as it was


def test_what_is_written_says_its_version_and_is_read_as_it_was() -> None:
    config = config_of_version_1()
    values = json.loads(json.dumps(to_json(config)))
    assert values["version"] == 2
    assert from_json(values) == config


def test_a_config_of_a_newer_version_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_json(default()) | {"version": 3}))
    with pytest.raises(UserError, match=r"^the workdir was written by a newer version .* version 3, .* up to 2") as e:
        read_config(tmp_path)
    assert "\n" not in str(e.value)


def test_an_unknown_key_is_kept_and_reported() -> None:
    config = from_json(version_1(crops="pad", views={"count": 2}))
    assert (config.data.crops, config.data.views.count) == ("pad", 2)
    with pytest.raises(UserError, match=r"config\.data\.crops: no such key"):
        validate(config)


def test_version_2_has_no_keys_of_version_1() -> None:
    values = to_json(default())
    values["data"]["crop"] = "pad"
    with pytest.raises(UserError, match=r"config\.data\.crop: no such key; it is now data\.image\.crop$"):
        validate(from_json(values))


@pytest.mark.parametrize("version", [{}, {"version": 2}])
def test_dropped_keys_may_have_their_defaults_alone(monkeypatch: pytest.MonkeyPatch, version: dict[str, int]) -> None:
    monkeypatch.setattr(stored, "DROPPED", {"slow": False, "data.sizes": (1, 2), "model.old": None})
    values = to_json(default())
    del values["version"]
    values |= version
    values["slow"], values["data"]["sizes"], values["model"]["old"] = False, [1, 2], None
    assert from_json(values) == default()
    values["slow"], values["data"]["sizes"] = True, [1, 3]
    with pytest.raises(UserError, match=r"^config\.slow=True, config\.data\.sizes=\(1, 3\): .* no longer has") as e:
        from_json(values)
    assert "\n" not in str(e.value)
    assert "old" not in str(e.value).partition(":")[0]


def with_dropped(config: ConfigDict, **changed: Any) -> dict[str, Any]:
    """Return `config` as version 2 stored it when it had the dropped keys, at their defaults but for those changed."""
    values = to_json(config)
    for key, value in (stored.DROPPED | changed).items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    return values


@pytest.mark.parametrize("key", stored.DROPPED)
def test_each_dropped_key_is_read_at_its_default_and_named_at_another_value(key: str) -> None:
    assert key not in dict(leaves(default()))
    before = dict(leaves(ConfigDict(version_1())))  # which has all of them
    assert before[key] == stored.DROPPED[key]
    assert from_json(with_dropped(default())) == default()
    changed = {"auto": "float32", False: True}.get(before[key], 0.5)
    with pytest.raises(UserError, match=rf"^config\.{key}={changed}: this version of jax_resnet no longer has") as e:
        from_json(with_dropped(default(), **{key: changed}))
    assert "\n" not in str(e.value)


# ---- a workdir -------------------------------------------------------------------------------------------------------


def age(workdir: Path, values: dict[str, Any]) -> None:
    """Put `values`, of version 1, where the config is stored: in config.json and in the record of each checkpoint."""
    (workdir / "config.json").write_text(json.dumps(values))
    with Checkpoints(workdir) as checkpoints:
        for step in checkpoints.steps():
            record = checkpoints.record(step) | {"config": values}
            record["sha256"] = _digest_of_record(record)
            file = workdir / "checkpoints" / str(step) / "record" / "metadata"
            assert file.exists()
            file.write_text(json.dumps(record))


def test_a_guard_that_kept_the_mean_of_losses_is_restored(tmp_path: Path, tiny_config: ConfigDict) -> None:
    """Earlier versions saved that too, where guard.loss_spike was on: a run goes on, and is evaluated, without it."""
    tiny_config.stop_after_steps = 8
    train(tiny_config, tmp_path / "new")
    mean = {"loss": jnp.float32(1.5), "losses": jnp.int32(8)}
    experiment = build(tiny_config)
    with Checkpoints(tmp_path / "new") as new:
        fields = to_fields(restored(new, 8, experiment))
    (tmp_path / "old").mkdir()
    with Checkpoints(tmp_path / "old", Keep()) as old:
        old.save(8, fields | {"guard": fields["guard"] | mean}, with_dropped(experiment.config))
    write_json(tmp_path / "old" / "config.json", with_dropped(experiment.config))
    evaluated = [evaluate_checkpoint(tmp_path / name, which="8")["splits"] for name in ("new", "old")]
    assert evaluated[0] == evaluated[1]
    tiny_config.stop_after_steps = None
    for name in ("new", "old"):
        train(tiny_config, tmp_path / name)
    assert_bit_identical(tmp_path / "old", tmp_path / "new")


@pytest.mark.slow
def test_a_workdir_of_version_1_goes_on_and_is_evaluated_averaged_and_exported(
    tmp_path: Path,
) -> None:
    config = config_of_version_1()
    config.data.data_dir = str(tmp_path / "tfds")
    written = to_json(config)
    train(config, tmp_path / "straight")
    config.stop_after_steps = 8
    train(config, tmp_path / "aged")
    values = version_1(data_dir=config.data.data_dir)
    age(tmp_path / "aged", values)
    assert differences(read_config(tmp_path / "aged"), config) == []

    first = evaluate_checkpoint(tmp_path / "aged", which="8")
    assert first["config"] == written
    config.stop_after_steps = None
    train(config, tmp_path / "aged")
    assert json.loads((tmp_path / "aged" / "config.json").read_text()) == values
    assert_bit_identical(tmp_path / "aged", tmp_path / "straight")

    age(tmp_path / "aged", values)
    metrics, _ = average(tmp_path / "aged", batches=2)
    assert metrics["examples"] == first["splits"]["test"]["examples"]
    export(tmp_path / "aged")
    np.testing.assert_equal(read_weights(str(tmp_path / "aged")).mean, (0.3,))

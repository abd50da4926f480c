"""Weights from elsewhere: what is loaded from where, what is refused, what is frozen, how rates decay by layer."""

import http.server
import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, run_main
from flax import nnx
from ml_collections import ConfigDict
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file
from workdirs import restored

from jax_resnet.config import default
from jax_resnet.data.image.pixels import Pixels
from jax_resnet.errors import UserError
from jax_resnet.inference.safetensors import export, hub_config, timm_name
from jax_resnet.models.torch_names import flatten, to_torch
from jax_resnet.models.zoo import create_model, model_spec
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.training.evaluate import evaluate_checkpoint
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.loop import train
from jax_resnet.training.pretrained import fitting, placed

TINY = ROOT / "tests" / "tiny.py"


def arrays_of(state: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten(state.params, state.batch_stats).items()}


def random_like(state: Any, seed: int = 0) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)
    return {name: r.uniform(0.1, 1, x.shape).astype(np.float32) for name, x in arrays_of(state).items()}


def error(experiment: Experiment, path: Path | str) -> str:
    with pytest.raises(UserError) as e:
        fitting(str(path), experiment.network.abstract_state, experiment.network.spec)
    text = str(e.value)
    assert text.startswith(f"config.init_from={path}: ")
    assert "\n" not in text
    return text


@pytest.fixture
def experiment(tiny_config: ConfigDict) -> Experiment:
    return build(tiny_config)


@pytest.fixture
def tensors(experiment: Experiment) -> dict[str, np.ndarray]:
    """Random weights of the tiny network under PyTorch's names."""
    return to_torch(random_like(experiment.network.fresh_state()), experiment.network.spec)


# ---- what is loaded --------------------------------------------------------------------------------------------------


def test_safetensors_with_all_of_it(experiment: Experiment, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "w.safetensors")
    fresh = experiment.network.fresh_state()
    arrays, report, _ = fitting(
        str(tmp_path / "w.safetensors"), experiment.network.abstract_state, experiment.network.spec
    )
    state = placed(fresh, arrays)
    expected = random_like(fresh)
    for name, array in arrays_of(state).items():
        assert_array_equal(array, expected[name])
    assert report.lines() == {
        "loaded": f"{len(expected)} of {len(expected)} arrays",
        "left out": "nothing",
        "new": "nothing",
    }
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
    for kind in ("opt_state", "step"):
        jax.tree.map(assert_array_equal, getattr(state, kind), getattr(fresh, kind))


def test_other_classes_and_channels(experiment: Experiment, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    grey = tensors["conv1.weight"]
    r = np.random.default_rng(1)
    tensors["conv1.weight"] = r.normal(size=(16, 3, 3, 3)).astype(np.float32)
    tensors["fc.weight"], tensors["fc.bias"] = np.ones((1000, 24), np.float32), np.ones(1000, np.float32)
    save_file(tensors, tmp_path / "w.safetensors")
    fresh = experiment.network.fresh_state()
    arrays, report, _ = fitting(
        str(tmp_path / "w.safetensors"), experiment.network.abstract_state, experiment.network.spec
    )
    state = arrays_of(placed(fresh, arrays))
    summed = tensors["conv1.weight"].sum(1, keepdims=True)
    assert summed.shape == grey.shape
    np.testing.assert_allclose(state["stem/conv1/kernel"], summed.transpose(2, 3, 1, 0), rtol=1e-6)
    assert_array_equal(state["head/kernel"], arrays_of(fresh)["head/kernel"])
    lines = report.lines()
    assert lines["left out"] == "fc.bias, fc.weight"
    assert lines["new"] == "head/bias, head/kernel"
    assert "stem/conv1/kernel summed" in lines["loaded"]


def test_a_run_of_ours_and_one_of_its_steps(tiny_config: ConfigDict, experiment: Experiment, tmp_path: Path) -> None:
    train(tiny_config, tmp_path / "run")
    with Checkpoints(tmp_path / "run") as checkpoints:
        best, steps = checkpoints.best_step(), checkpoints.steps()
        saved = {step: arrays_of(restored(checkpoints, step, experiment)) for step in steps}
    assert best is not None
    for path, step in ((tmp_path / "run", best), (tmp_path / "run" / "checkpoints" / f"{steps[0]}", steps[0])):
        arrays, _, weights = fitting(str(path), experiment.network.abstract_state, experiment.network.spec)
        assert arrays.keys() == saved[step].keys()
        for name, array in arrays.items():
            assert_array_equal(array, saved[step][name])
    assert (weights.architecture, weights.mean, weights.std) == ("cifar_resnet8", (0.3,), (0.2,))
    assert "no such file; known: " in error(experiment, tmp_path / "run" / "checkpoints" / "7")


def test_a_run_begins_with_the_weights_and_goes_on_without_them(tiny_config: ConfigDict, tmp_path: Path) -> None:
    train(tiny_config, tmp_path / "first")
    (file, *_) = export(tmp_path / "first")
    at_the_end = evaluate_checkpoint(tmp_path / "first")["splits"]["test"]

    tiny_config.init_from = str(file)
    assert evaluate_checkpoint(tmp_path / "none", config=tiny_config, which="init")["splits"]["test"] == at_the_end
    tiny_config.stop_after_steps = 5
    train(tiny_config, tmp_path / "stopped")
    tiny_config.stop_after_steps = None
    whole = train(tiny_config, tmp_path / "whole")
    assert whole["splits"]["test"]["loss"] < at_the_end["loss"]  # 20 more steps
    file.unlink()
    assert train(tiny_config, tmp_path / "stopped") == whole
    with pytest.raises(UserError, match="no such file"):
        train(tiny_config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_the_command_says(tiny_npz: Path, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    tensors["fc.weight"], tensors["fc.bias"] = np.ones((9, 24), np.float32), np.ones(9, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    described = {"architecture": "x", "pretrained_cfg": {"mean": [0.5], "std": [0.25]}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    done = run_main(f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path / 'run'}", f"--config.init_from={tmp_path}",
                    "--config.stop_after_steps=1")  # fmt: skip
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["weights", str(tmp_path)] in lines
    assert ["loaded", "25 of 27 arrays"] in lines
    assert ["left", "out  fc.bias, fc.weight"] in lines
    assert ["new", "head/bias, head/kernel"] in lines
    assert any(line[0] == "note" and "--config.data.image.mean=(0.5,)" in line[1] for line in lines)
    assert done.returncode == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(experiment: Experiment, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(tensors, whole)
    data = whole.read_bytes()
    for size in (0, 5, 300, len(data) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(data[:size])
        assert "not a whole safetensors file" in error(experiment, cut)
    assert "no such file; did you mean whole.safetensors?" in error(experiment, tmp_path / "hole.safetensors")
    assert "no such file" in error(experiment, tmp_path / "a" / "b.safetensors")
    (tmp_path / "w.onnx").write_bytes(b"x")
    assert "must be .safetensors or" in error(experiment, tmp_path / "w.onnx")
    (tmp_path / "empty").mkdir()
    assert "a folder without checkpoints" in error(experiment, tmp_path / "empty")
    assert "hf://ORGANISATION/NAME" in error(experiment, "https://example.org/w.safetensors")
    assert "hf://ORGANISATION/NAME" in error(experiment, "hf://resnet50")


def test_weights_of_another_network(experiment: Experiment, tmp_path: Path) -> None:
    def weights_of(name: str, **options: Any) -> Path:
        model = nnx.eval_shape(lambda: create_model(name, num_classes=4, in_channels=1, rngs=nnx.Rngs(0), **options))
        arrays = {n: np.zeros(x.shape) for n, x in flatten(nnx.state(model)).items()}
        save_file(to_torch(arrays, model.spec), tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    widths = {"widths": (16, 24)}
    deeper = error(experiment, weights_of("cifar_resnet14", depths=(2, 2), **widths))
    assert "layer1.1.bn1.bias is not of this network, one of 20" in deeper
    preactivation = error(experiment, weights_of("cifar_resnetv2_8", depths=(1, 1), **widths))
    assert "layer1.0.conv1.weight (stage1/block0/conv1/kernel) is missing" in preactivation
    wider = error(experiment, weights_of("cifar_resnet8", depths=(1, 1), widths=(16, 32)))
    assert "(stage2/block0/conv1/kernel) is (32, 16, 3, 3) there, (24, 16, 3, 3) in this network" in wider
    assert jax.tree.leaves(experiment.network.abstract_state)[0].shape == ()  # still of use


class _Malicious:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_a_pickle_runs_nothing(experiment: Experiment, tmp_path: Path) -> None:
    done = tmp_path / "done"
    bad = tmp_path / "bad.pth"
    bad.write_bytes(pickle.dumps({"state_dict": _Malicious(done)}))
    text = error(experiment, bad)
    assert ("which could run code" if "torch" in sys.modules else "pip install") in text
    assert not done.exists()
    pickle.loads(bad.read_bytes())
    assert done.exists()  # it would have


def test_torch_files(experiment: Experiment, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    content = {
        "epoch": 3,
        "model": {"module." + name: torch.zeros(array.shape) for name, array in tensors.items()},
        "model_ema": {"module." + name: torch.from_numpy(array) for name, array in tensors.items()},
    }
    torch.save(content, tmp_path / "w.pth")
    arrays, *_ = fitting(str(tmp_path / "w.pth"), experiment.network.abstract_state, experiment.network.spec)
    for name, array in random_like(experiment.network.fresh_state()).items():
        assert_array_equal(arrays[name], array)
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    assert "cut.pth: " in error(experiment, tmp_path / "cut.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    assert "holds a Tensor, not tensors by name" in error(experiment, tmp_path / "tensor.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    assert "holds no tensors by name" in error(experiment, tmp_path / "none.pth")


def test_akamaster_by_the_command(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra `torch`")
    done = run_main(
        "--mode=eval", "--checkpoint=init", "--config=resnet_cifar", f"--workdir={tmp_path}",
        f"--config.init_from={shared / 'oracle' / 'akamaster_resnet20.th'}",
        f"--config.data.name=npz:{shared / 'data' / 'cifar10_lossless_subset.npz'}",
        "--config.data.image.mean=(0.485, 0.456, 0.406)", "--config.data.image.std=(0.229, 0.224, 0.225)",
    )  # fmt: skip
    assert "91.50 % (915 of 1,000)" in done.stdout, done.stderr


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that speaks as much of the hub's protocol as a download takes; files: ORG/NAME/FILE in its folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            org, name, _, revision, file = (self.path.strip("/").split("/", 4) + [""] * 5)[:5]
            path = folder / org / name / file
            if not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if path.parent.is_dir() else "RepoNotFound")
                self.end_headers()
                return b""
            data = path.read_bytes()
            self.send_response(200)
            commit = {"main": "a" * 40}.get(revision, revision)
            for key, value in (
                ("X-Repo-Commit", commit),
                ("ETag", f'"{len(data)}"'),
                ("Content-Length", str(len(data))),
            ):
                self.send_header(key, value)
            self.end_headers()
            return data

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        yield folder
        server.shutdown()


def test_from_the_hub(hub: Path, tiny_npz: Path, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    served = hub / "timm" / "tiny"
    served.mkdir(parents=True)
    save_file(tensors, served / "model.safetensors")
    (served / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}')

    def begin(path: str) -> Any:  # the hub's library reads its address when it is first imported
        return run_main(f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path / 'run'}", "--config.stop_after_steps=1",
                        f"--config.init_from={path}")  # fmt: skip

    (served / "model.safetensors").rename(served / "gone")
    assert "has neither model.safetensors nor pytorch_model.bin" in begin("hf://timm/tiny@" + "b" * 40).stderr
    assert "cannot be fetched" in begin("hf://timm/tni").stderr
    (served / "gone").rename(served / "model.safetensors")
    done = begin("hf://timm/tiny")
    assert done.returncode == 0, done.stderr
    assert f"{len(tensors)} of {len(tensors)} arrays" in done.stdout
    assert "--config.data.image.mean=(0.5,)" in done.stdout


# ---- freezing and layer-wise decay -----------------------------------------------------------------------------------


def after_steps(config: ConfigDict, tmp_path: Path, steps: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays before the first step and after `steps`."""
    experiment = build(config)
    before = arrays_of(experiment.network.fresh_state())
    config.stop_after_steps = steps
    train(config, tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        return before, arrays_of(restored(checkpoints, steps, experiment))


@pytest.mark.parametrize("parts", [1, 3])  # a third of three equal numbers added up is not always the number
def test_frozen_parts_stay_bit_for_bit(tiny_config: ConfigDict, tmp_path: Path, parts: int) -> None:
    tiny_config.batch_size, tiny_config.accumulate, tiny_config.model.bn_group_size = 15, parts, 5
    tiny_config.freeze = ("stem", "stage1")
    tiny_config.optimizer.weight_decay = 0.1
    tiny_config.schedule.warmup.steps = 0
    before, after = after_steps(tiny_config, tmp_path)
    for name in before:
        frozen = name.startswith(("stem/", "stage1/"))
        assert np.array_equal(before[name], after[name]) == frozen, name


def test_what_may_be_frozen(tiny_config: ConfigDict) -> None:
    tiny_config.freeze = ("stage9",)
    with pytest.raises(UserError, match=r"config\.freeze: unknown name 'stage9'; did you mean stage"):
        build(tiny_config)
    tiny_config.freeze = ("stem", "stage1", "stage2", "head")
    with pytest.raises(UserError, match="nothing is left to be trained"):
        build(tiny_config)


def test_rates_decay_by_layer(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """One step of plain SGD moves each parameter in proportion to its rate."""
    tiny_config.schedule.warmup.steps = 0
    tiny_config.optimizer.momentum = 0.0
    moved = []
    for decay in (1.0, 0.5):
        tiny_config.optimizer.layer_decay = decay
        before, after = after_steps(tiny_config, tmp_path / f"{decay}", steps=1)
        moved.append({name: after[name] - before[name] for name in before})
    layers_above = {"stem": 3, "stage1": 2, "stage2": 1, "head": 0}  # one block in each stage
    for name in moved[0]:
        scale = 1.0 if name.endswith(("mean", "var")) else 0.5 ** layers_above[name.split("/")[0]]
        np.testing.assert_allclose(moved[1][name], scale * moved[0][name], rtol=1e-3, atol=1e-6, err_msg=name)


# ---- what is exported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"drop_path": 0.1, "init": "fan_in", "head_std": 0.0, "head_prior": True}, "resnet50"),
        ({"antialias": "blur"}, "resnetblur50"),
        ({"antialias": "blur_conv"}, None),
        ({"stem_pool": "blur_max"}, None),
    ],
)
def test_timm_knows_a_network_by_what_changes_its_answers(options: dict[str, Any], name: str | None) -> None:
    assert timm_name(model_spec("resnet50", **options)) == name


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        ("random_resized", (0.9, "center")),
        ("scaled", (0.9, "center")),
        ("stretched", (1.0, "squash")),
        ("pad", (1.0, "center")),
        ("none", (1.0, "center")),
    ],
)
def test_what_is_exported_is_evaluated_by_timm_as_here(crop: str, expected: tuple[float, str]) -> None:
    c = default()
    c.data.image.update({"crop": crop, "eval_crop": 0.9, "interpolation": "bicubic", "size": 224})
    assert Pixels.of(c.data.image, 224).eval_crop == expected[0]
    facts = {"image_shape": [224, 224, 3], "class_names": ["a"]}
    found = hub_config("resnet50", model_spec("resnet50"), c, 1, facts)["pretrained_cfg"]
    assert (found["crop_pct"], found["crop_mode"], found["interpolation"]) == (*expected, "bicubic")


def test_export_of_a_run(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.model.update(name="test_resnet", depths=None, widths=None)
    tiny_config.data.image.size = 32
    tiny_config.stop_after_steps = 2
    train(tiny_config, tmp_path / "run")
    files = export(tmp_path / "run", checkpoint="latest")
    assert files == [tmp_path / "run" / "export" / name for name in ("model.safetensors", "config.json")]
    experiment = build(tiny_config)
    with Checkpoints(tmp_path / "run") as checkpoints:
        expected = to_torch(arrays_of(restored(checkpoints, 2, experiment)), experiment.network.spec)
    tensors = load_file(files[0])
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert_array_equal(tensor, expected[name])
    described = json.loads(files[1].read_text())
    assert described["architecture"] == "test_resnet"
    assert described["num_classes"] == 4
    assert described["label_names"] == ["0", "1", "2", "3"]
    assert described["model_args"] == {"in_chans": 1}
    facts = described["pretrained_cfg"]
    assert facts["input_size"] == [1, 32, 32]
    assert (facts["mean"], facts["std"], facts["crop_pct"]) == ([0.3], [0.2], 1.0)
    assert (facts["first_conv"], facts["classifier"]) == ("conv1.0", "fc")
    assert {f"{facts[key]}.weight" for key in ("first_conv", "classifier")} <= tensors.keys()

    export(tmp_path / "run")  # again, over the default place
    with pytest.raises(UserError, match="is there already; choose another --out"):
        export(tmp_path / "run", out=str(tmp_path / "run" / "export"))
    with pytest.raises(UserError, match="no checkpoint at step 9; saved: 2"):
        export(tmp_path / "run", checkpoint="9")
    with pytest.raises(UserError, match="no checkpoint has been saved here"):
        export(tmp_path / "nothing")

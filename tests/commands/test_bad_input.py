"""What a user or a machine can get wrong: for each the one line there is, status 2, and nothing saved.

`PYTHONPATH=tests python tests/commands/test_bad_input.py` prints the table.
"""

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import safetensors.numpy
import tiny
from absl.testing import flagsaver
from conftest import ROOT, main_command, main_env, run_main

from jax_resnet import main
from jax_resnet.commands.ending import lacking
from jax_resnet.commands.status import exit_status, fail
from jax_resnet.data import tfds as tfds_source  # noqa: F401
from jax_resnet.errors import TransientError, UserError, unwritable
from jax_resnet.models.torch_names import flatten, to_torch
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.training.experiment import build

TINY = ROOT / "tests" / "tiny.py"
RUN = "--config={tiny}:{npz} --workdir={tmp}/run"


@dataclass(frozen=True)
class Case:
    """`args`, in which {tmp}, {npz} and {tiny} stand for files, after `prepare`; `line`: words of the answer."""

    area: str
    what: str
    args: str
    line: tuple[str, ...]
    prepare: Callable[[Path, Path], object] | None = None
    env: dict[str, str] = field(default_factory=dict)  # a process of its own, as is `devices`
    devices: int = 0
    saved: bool = False  # there is something in the workdir before


def config(area: str, what: str, values: str, *line: str, **more: object) -> Case:
    """A run of tests/tiny.py with values changed."""
    changes = " ".join(shlex.quote(f"--config.{value}") for value in values.split())
    return Case(area, what, f"{RUN} {changes}", line, **more)  # type: ignore[arg-type]


def command(what: str, args: str, *line: str, **more: object) -> Case:
    return Case("command", what, args, line, **more)  # type: ignore[arg-type]


def mine(what: str, text: str, *line: str) -> Case:
    """A config file of the user's own."""
    name = re.sub(r"\W", "_", what)
    args = f"--config={{tmp}}/{name}.py"
    return Case("config", what, args, line, lambda tmp, _: (tmp / f"{name}.py").write_text(text))


def arrays(what: str, change: dict[str, np.ndarray], *line: str) -> Case:
    """The .npz with arrays replaced."""

    def prepare(tmp: Path, npz: Path) -> None:
        np.savez(tmp / "bad.npz", **(dict(np.load(npz)) | change))

    return config("data", what, "data.name=npz:{tmp}/bad.npz", *line, prepare=prepare)


def files(area: str, what: str, content: dict[str, bytes], values: str, *line: str) -> Case:
    """Files of that content, and values that name them."""

    def prepare(tmp: Path, _: Path) -> None:
        for name, data in content.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_bytes(data)

    return config(area, what, values, *line, prepare=prepare)


def cut_npz(tmp: Path, npz: Path) -> None:
    (tmp / "bad.npz").write_bytes(npz.read_bytes()[:9000])


def tensors(**replaced: np.ndarray | None) -> Callable[[Path, Path], None]:
    """Writes the weights of the network of tests/tiny.py to weights.safetensors, some replaced or (None) left out."""

    def prepare(tmp: Path, _: Path) -> None:
        given = dict(WEIGHTS) | {name.replace("__", "."): value for name, value in replaced.items()}
        kept = {name: value for name, value in given.items() if value is not None}
        safetensors.numpy.save_file(kept, tmp / "weights.safetensors")

    return prepare


def cut_weights(tmp: Path, npz: Path) -> None:
    tensors()(tmp, npz)
    file = tmp / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def images_of_a_folder(data: bytes) -> dict[str, bytes]:
    return {f"folder/{split}/{name}/{i}.png": data for split in ("train", "val") for name in "ab" for i in range(20)}


def damaged_checkpoint(tmp: Path, _: Path) -> None:
    (step,) = (tmp / "run" / "checkpoints").glob("1")
    for file in step.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


WEIGHTS: dict[str, np.ndarray] = {}  # filled by a fixture
OWN = """from jax_resnet.config import default
def get_config():
    c = default()
    {}
    return c
"""
FOLDER = "data.name=folder:{tmp}/folder data.image.size=12 model.num_classes=2"
RATES = "(('head/.*',2.0),('bias',1.0))"

CASES = [
    command("nothing at all", "", "--config is missing", "configs/resnet20_digits.py"),
    command("--config without a file", "--config", "--config"),
    command("a mistyped file", "--config=configs/resnet20_digit.py", "no file", "did you mean", "resnet20_digits"),
    command("a file in no folder", "--config=/nowhere/resnet_cifar.py:20", "no file '/nowhere/resnet_cifar.py'"),
    command("a folder as the config", "--config={tmp}", "no file"),
    command("a mistyped group", "--config=resnet20_digits --config.modle.depth=3", "modle.depth", "model.depths"),
    command("a key without group", "--config=resnet20_digits --config.learning_rate=1", "optimizer.learning_rate"),
    command("a mistyped key", "--config=resnet20_digits --config.optimizer.momentun=1", "optimizer.momentum"),
    command("a renamed key", "--config=resnet20_digits --config.data.crop=pad", "data.crop: ", "now data.image.crop"),
    command("another", "--config=resnet20_digits --config.data.image_size=64", "image_size: ", "now data.image.size"),
    command("one as a flag", "--config=resnet20_digits --data.pad=3", "did you mean --config.data.image.pad?"),
    command("a key of images without group", "--config=resnet20_digits --config.crop=pad", "mean data.image.crop?"),
    command("a key as a flag", "--config=resnet20_digits --seed=3", "no such flag", "did you mean --config.seed?"),
    command("another", "--config=resnet20_digits --batch_size=3", "did you mean --config.batch_size?"),
    command("a mistyped flag", "--config=resnet20_digits --wokrdir=/tmp/x", "--wokrdir", "did you mean workdir"),
    command("a key without a file", "--config.seed=3", "--config.seed", "--config=FILE"),
    command(
        "a word for a number",
        "--config=resnet20_digits --config.batch_size=abc",
        *("--config.batch_size=abc", "type int", "--config.batch_size=256"),
    ),
    command("another", "--config=resnet20_digits --config.loss.label_smoothing=lots", "label_smoothing", "float"),
    command("a fraction of an example", "--config=resnet20_digits --config.batch_size=16.5", "batch_size=16.5", "int"),
    command("a word for yes or no", "--config=resnet20_digits --config.data.image.flip=perhaps", "image.flip", "bool"),
    command("a value for a group", "--config=resnet20_digits --config.model=resnet50", "--config.model"),
    command("a mistyped mode", "--config=resnet20_digits --mode=evaluate", "mode", "train", "eval"),
    command("a value without --", "--config=resnet20_digits batch_size=3", "'batch_size=3'", "not a flag"),
    command("a depth there is none of", "--config=resnet_cifar:21", "cifar_resnet21", "6n+2", "20"),
    command("a depth that is a word", "--config=resnet_cifar:deep", "cifar_resnetdeep"),
    mine("a name that is not there", "def get_config():\n    return nothing\n", "not_there.py, line 2", "NameError"),
    mine("a fault of another kind", "def get_config():\n    return int('x')\n", "ValueError in ", "line 2: invalid"),
    mine("a renamed key", OWN.format("c.data.crop = 'pad'"), "config.data.crop: ", "it is now data.image.crop"),
    mine("a renamed key in a group", OWN.format("c.data.update(image_size=64)"), "it is now data.image.size"),
    mine("a renamed key that is read", OWN.format("c.data.pad += 1"), "read.py, line 4", "now data.image.pad"),
    mine("a renamed key when locked", OWN.format("c.lock().data.crop = 'pad'"), ".py, line 4", "now data.image.crop"),
    mine("a package that is missing", "import nonesuch\n", "ModuleNotFoundError", ".py, line 1", "nonesuch"),
    mine("a file that is no Python", "def get_config(:\n", "SyntaxError", ".py, line 1"),
    mine("a file of binary rubbish", "\x00\x01", "--config: "),
    mine("get_config() without return", "def get_config():\n    return None\n", "get_config() returned NoneType"),
    mine("no function", "x = 3\n", "defines no get_config()"),
    mine(
        "a config of its own",
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 1})\n",
        "is missing",
    ),
    config("config", "a network there is none of", "model.name=resnet51", "resnet51", "resnet50"),
    config("config", "a stem there is none of", "model.stem=cfar", "stem='cfar'", "imagenet or cifar"),
    config("config", "a norm there is none of", "model.norm=layer", "norm", "layer"),
    config("config", "too few depths", "model.depths=3", "depths=(3,)", "one of each for every stage"),
    config("config", "no blocks", "model.depths=(0,0)", "depths"),
    config("config", "no channels", "model.widths=(0,0)", "widths"),
    config("config", "an optimizer there is none of", "optimizer.name=sdg", "config.optimizer.name", "'sdg'", "sgd"),
    config("config", "a mistyped schedule", "schedule.name=cosin", "config.schedule.name", "cosine"),
    config("config", "a number that is none", "optimizer.learning_rate=nan", "learning_rate=nan", "more than 0"),
    config("config", "an infinite rate", "optimizer.learning_rate=inf", "learning_rate=inf", "more than 0"),
    config("config", "a negative rate", "optimizer.learning_rate=-1", "learning_rate=-1", "more than 0"),
    config("config", "a mean that is no number", "data.image.mean=(nan,)", "data.image.mean", "nan", "must be numbers"),
    config("config", "no deviation", "data.image.std=(0,)", "config.data.image.std", "more than 0"),
    config("config", "as many means as no image has", "data.image.mean=(0.1,0.2)", "data.image.mean", "1 number"),
    config("config", "two channels", "data.image.channels=2", "config.data.image.channels=2", "1 or 3"),
    config("config", "an empty batch", "batch_size=0", "config.batch_size=0", "at least 1"),
    config("config", "a batch larger than the data", "batch_size=101", "config.batch_size=101", "100 examples"),
    config("config", "a batch beyond all", "batch_size=999999999999", "config.batch_size=999999999999", "examples"),
    config("config", "parts that do not divide", "accumulate=3", "accumulate=3 does not divide config.batch_size=16"),
    config("config", "a group that does not divide", "model.bn_group_size=5", "5", "config.batch_size=16"),
    config("config", "a negative seed", "seed=-1", "config.seed=-1", "at least 0"),
    config("config", "two durations", "train.steps=3 train.epochs=2", "config.train", "exactly one"),
    config("config", "no duration", "train.steps=0", "config.train is 0"),
    config("config", "a duration that is no number", "train.epochs=nan", "config.train.epochs=nan", "number"),
    config("config", "a duration stretched beyond all", "stretch=1e300", "config.stretch=1e+300", "at most 1000"),
    config("config", "nothing but warm-up", "schedule.warmup.steps=20", "config.schedule.warmup", "20"),
    config("config", "warm-up into cooldown", "schedule.cooldown.steps=16", "warmup is 4 steps and cooldown 16", "20"),
    config(
        *("config", "warm-up besides knots", "schedule.name=piecewise", "config.schedule.warmup", "knots"),
        "--config.schedule.warmup.steps=0",
    ),
    config("config", "knots beyond the end", "schedule.name=piecewise schedule.knots=((0,1),(2,0))", "schedule", "0"),
    config("config", "a key without effect", "loss.bce_sum=True", "bce_sum", "config.loss.name=cross_entropy"),
    config(
        *("config", "crops smaller than images"),
        "data.image.crop=stretched data.image.size=12 data.image.crop_resize=(8,16)",
        *("crop_resize=(8, 16)", "12"),
    ),
    config(
        *("config", "crops next to nothing", "data.image.crop=scaled data.image.size=12"),
        *("config.data.image.crop_resize=(256, 480)", "12 pixels"),
    ),
    config("config", "a pattern of nothing", 'optimizer.no_decay=(\'head/.*x\',)', "no_decay", "matches no parameter"),
    config("config", "no pattern", "optimizer.no_decay=('[',)", "no_decay", "is no pattern"),
    config("config", "two rates for one", f"optimizer.rate_factors={RATES}", "rate_factors", "both cover head/bias"),
    config("config", "a part there is none of", "freeze=('hed',)", "config.freeze", "did you mean head?"),
    config("config", "images too small", "data.image.size=1", "cifar_resnet8", "at least 2", "have 1"),
    config("data", "a dataset there is none of", "data.name=cifar01", "cifar01", "cifar10"),
    config(
        *("data", "a dataset not prepared", "data.name=cifar10 data.data_dir={tmp}"),
        "tfds build cifar10 --file_format=array_record --data_dir={tmp}",
    ),
    config("data", "a folder that is not there", "data.name=folder:/nowhere", "folder:/nowhere", "no such folder"),
    config("data", "a file as the folder", "data.name=folder:{npz}", "folder:", "no such folder"),
    config("data", "an empty folder", "data.name=folder:{tmp}", "neither train/ and val/", "--config.data.holdout"),
    config("data", "a file that is not there", "data.name=npz:/nowhere.npz", "npz:/nowhere.npz", "no such file"),
    config("data", "a folder as the file", "data.name=npz:{tmp}", "cannot be read as .npz", "Is a directory"),
    config("data", "a file cut short", "data.name=npz:{tmp}/bad.npz", "cannot be read as .npz", prepare=cut_npz),
    files("data", "a file of rubbish", {"bad.npz": b"PK\3\4 and no more"}, "data.name=npz:{tmp}/bad.npz", "cannot be"),
    files("data", "an empty file", {"bad.npz": b""}, "data.name=npz:{tmp}/bad.npz", "cannot be read as .npz"),
    arrays(
        *("no images", {"x_train": np.zeros((0, 12, 12), np.uint8), "y_train": np.zeros(0, int)}),
        "the train split is empty",
    ),
    arrays("labels below 0", {"y_test": np.full(37, -1)}, "test label -1 of record 0 is out of range"),
    arrays("a class of the test alone", {"y_test": np.full(37, 4)}, "test label 4 of record 0 is out of range"),
    arrays("labels that count not", {"y_train": np.full(100, 7000)}, "train label 7000", "count classes from 0"),
    arrays("floating-point images", {"x_train": np.zeros((100, 12, 12), np.float32)}, "x_train is float32"),
    arrays("floating-point labels", {"y_train": np.zeros(100)}, "y_train is float64"),
    arrays("a label too few", {"y_train": np.zeros(99, int)}, "100 train images, but 99 labels"),
    arrays("images without pixels", {"x_train": np.zeros((100, 0, 12), np.uint8)}, "train images are (0, 12, 1)"),
    arrays("images of two sizes", {"x_test": np.zeros((37, 14, 14), np.uint8)}, "(12, 12", "data.image.size"),
    arrays("no array of images", {"x_train": np.zeros(100, np.uint8)}, "train images have shape (100,)"),
    arrays("pickled objects", {"x_train": np.array([None] * 100)}, "cannot be read as .npz"),
    files("data", "images of no bytes", images_of_a_folder(b""), FOLDER, "decoded"),
    files("data", "images of text", images_of_a_folder(b"<html>not found</html>"), FOLDER, "decoded"),
    files("data", "a class without images", {"folder/train/a/x.txt": b"", "folder/val/a/x": b""}, FOLDER, "no images"),
    config("data", "other classes than said", "model.num_classes=5", "config.model.num_classes=5", "4 classes"),
    config("weights", "a file that is not there", "init_from=/nowhere", "config.init_from=/nowhere: no such file"),
    config("weights", "an empty folder", "init_from={tmp}", "config.init_from=", "a folder without checkpoints"),
    config("weights", "another cloud", "init_from=az://x/y", "config.init_from=az://x/y: must be a path, gs://"),
    config("weights", "half a name of the hub", "init_from=hf://x", "must be hf://ORGANISATION/NAME"),
    files("weights", "another kind of file", {"w.h5": b"x"}, "init_from={tmp}/w.h5", "w.h5: must be .safetensors or"),
    files("weights", "an empty file", {"w.safetensors": b""}, "init_from={tmp}/w.safetensors", "not a whole"),
    config(
        *("weights", "a file cut short", "init_from={tmp}/weights.safetensors", "not a whole safetensors file"),
        prepare=cut_weights,
    ),
    config(
        *("weights", "of another width", "init_from={tmp}/weights.safetensors model.widths=(16,32)", "(24", "(32"),
        prepare=tensors(),
    ),
    config(
        *("weights", "an array left out", "init_from={tmp}/weights.safetensors", "bn1.weight", "is missing"),
        prepare=tensors(bn1__weight=None),
    ),
    config(
        *("weights", "no tensors", "init_from={tmp}/weights.safetensors", "config.init_from="),
        prepare=lambda tmp, _: safetensors.numpy.save_file({}, tmp / "weights.safetensors"),
    ),
    config("weights", "a teacher that is not there", "distill.teacher=/nowhere", "/nowhere: no such file"),
    Case(
        *("checkpoint", "a step that was not saved", "--mode=eval --workdir={tmp}/run --checkpoint=7"),
        *(("no checkpoint at step 7; saved: 1",),),
        saved=True,
    ),
    Case(
        *("checkpoint", "a word that is no step", "--mode=eval --workdir={tmp}/run --checkpoint=last"),
        *(("must be best, latest or a step",),),
        saved=True,
    ),
    Case("checkpoint", "no run", "--mode=eval --workdir={tmp}", ("no run has been begun here",)),
    Case(
        *("checkpoint", "damaged, the only one", RUN + " --config.stop_after_steps=2", ("checkpoints",)),
        prepare=damaged_checkpoint,
        saved=True,
    ),
    Case(
        *("checkpoint", "of another config", f"{RUN} --config.optimizer.momentum=0.5 --config.seed=3"),
        ("optimizer.momentum: 0.9 there, 0.5 here", "seed: 0 there, 3 here"),
        saved=True,
    ),
    Case(
        *("checkpoint", "of another network", RUN + " --config.model.widths=(16,32)", ("widths", "24", "32")),
        saved=True,
    ),
    Case(
        "workdir",
        "inside a file",
        "--config={tiny}:{npz} --workdir={tmp}/file/run",
        ("--workdir={tmp}/file/run: cannot be written",),
        lambda tmp, _: (tmp / "file").touch(),
    ),
    Case(
        "workdir",
        "a file",
        "--config={tiny}:{npz} --workdir={tmp}/file",
        ("--workdir={tmp}/file: cannot be written",),
        lambda tmp, _: (tmp / "file").touch(),
    ),
    Case(
        "workdir",
        "a file where TensorBoard's folder goes",
        RUN,
        ("{tmp}/run/tensorboard: cannot be written (",),
        lambda tmp, _: ((tmp / "run").mkdir(), (tmp / "run" / "tensorboard").touch()),
    ),
    Case("workdir", "a URL", "--config={tiny}:{npz} --workdir=az://bucket/run", ("gs://… or s3://…",)),
    Case(
        "workdir",
        "of the kernel's",
        "--config={tiny}:{npz} --workdir=/proc/run",
        ("--workdir=/proc/run: cannot be written",),
    ),
    Case(
        "devices", "a TPU that is not there", RUN, ("JAX_PLATFORMS=tpu", "=cpu"), env={"JAX_PLATFORMS": "tpu"}
    ),
    Case("devices", "a GPU that is not there", RUN, ("JAX_PLATFORMS=cuda",), env={"JAX_PLATFORMS": "cuda"}),
    Case("devices", "a kind there is none of", RUN, ("JAX_PLATFORMS=gpv",), env={"JAX_PLATFORMS": "gpv"}),
    config(
        *("devices", "a batch that they do not divide", "batch_size=20"),
        *("config.batch_size=20 is not divisible by the 8 devices", "the nearest is 16"),
        devices=8,
    ),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _weights(tiny_npz: Path) -> None:
    experiment = build(tiny.get_config(str(tiny_npz)))
    state = experiment.network.fresh_state()
    trees = jax.device_get((state.params, state.batch_stats))
    WEIGHTS.update(
        {name: np.ascontiguousarray(x) for name, x in to_torch(flatten(*trees), experiment.network.spec).items()}
    )


@pytest.fixture(scope="module")
def saved_run(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that has saved its first step."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    args = [f"--config={TINY}:{tiny_npz}", f"--workdir={workdir}", "--config.stop_after_steps=1"]
    assert run_main(*args).returncode == 0
    return workdir


def in_this_process(args: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """What `python -m jax_resnet.main ARGS` would exit with."""
    monkeypatch.setattr(sys, "argv", ["jax_resnet.main", *args])  # where ml_collections looks, too
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the name of every config file's module
    monkeypatch.setattr(main, "leave", lambda status: status)  # it ends the process where a thread still compiles
    with flagsaver.flagsaver():
        try:
            return main.main(main._parse(list(sys.argv)))
        except SystemExit as e:
            return int(e.code or 0)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.area}: {case.what}" for case in CASES])
def test_one_line(
    case: Case,
    tiny_npz: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {"tmp": tmp_path, "npz": tiny_npz, "tiny": TINY}
    if case.saved:
        shutil.copytree(request.getfixturevalue("saved_run"), tmp_path / "run")
    if case.prepare:
        case.prepare(tmp_path, tiny_npz)
    args = shlex.split(case.args.format(**places))
    if case.env or case.devices:
        done = programs.run(main_command(*args), env=main_env(case.devices or 1) | case.env, cwd=ROOT)
        status, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.chdir(ROOT)
        capfd.readouterr()
        status = in_this_process(args, monkeypatch)
        stdout, stderr = capfd.readouterr()
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert status == 2, stderr
    assert lines[-1].startswith("error: ")
    named = sum("; replaced by" in line or "left out" in line for line in lines)  # images that cannot be decoded
    assert len(lines) == 1 + named, stderr
    for words in case.line:
        assert words.format(**places) in lines[-1]
    assert "Traceback" not in stdout
    if case.saved:
        assert [d.name for d in (tmp_path / "run" / "checkpoints").iterdir() if d.name.isdigit()] == ["1"]
    else:
        assert not list(tmp_path.glob("run/checkpoints/*"))
        assert not list(tmp_path.rglob("*.part"))


def test_memory_that_runs_out() -> None:
    with pytest.raises(Exception, match=r"RESOURCE_EXHAUSTED|Out of memory") as e:
        jax.block_until_ready(jnp.zeros((1 << 23, 1 << 23)))
    for error in (e.value, MemoryError("Unable to allocate 149. GiB")):
        assert re.match(r"memory ran out \(.*\); give a smaller config\.batch_size", str(lacking(error)))


def test_what_a_machine_has_no_more_of() -> None:
    with pytest.raises(OSError, match="No space left") as e:
        Path("/dev/full").write_text("x")
    assert "No space left on device" in str(lacking(e.value))
    line = str(lacking(OSError(errno.EMFILE, "Too many open files", "/a")))
    assert line == "/a: cannot be written or opened (Too many open files)"


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError(errno.ENOENT, "No such file")])
def test_faults_of_the_program_are_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)) as e:
        lacking(error)
    assert e.value is error


@pytest.mark.parametrize(("hush", "said"), [("", "coroutine 'begun' was never awaited"), ("hush()", "")])
def test_what_a_library_had_begun_at_the_end_is_not_told_of(hush: str, said: str) -> None:
    """As Orbax's writer sometimes has where a disk is full; Python tells of it as it takes everything apart."""
    program = f"""
from jax_resnet.commands.ending import hush
{hush}
async def begun(): ...
class Writer: ...
writer = Writer()
writer.itself, writer.has = writer, begun()
"""
    done = programs.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert said in done.stderr
    assert said or not done.stderr


ENDS = """
import sys, threading
from jax_resnet.commands.ending import hush
hush()
def fault():
    raise OSError({code}, {text!r})
if sys.argv[1] == "thread":
    thread = threading.Thread(target=fault)
    thread.start()
    thread.join()
else:
    fault()
"""


@pytest.mark.parametrize(
    ("where", "code", "text", "said"),
    [
        ("thread", errno.ENOSPC, "No space left on device", False),  # the run's own line tells of it
        ("thread", errno.EIO, "Input/output error", True),
        ("main", errno.ENOSPC, "No space left on device", True),
        ("main", errno.EEXIST, "File exists", True),
    ],
)
def test_no_error_is_left_unprinted_by_its_type(where: str, code: int, text: str, said: bool) -> None:
    done = programs.run([sys.executable, "-c", ENDS.format(code=code, text=text), where], env=main_env())
    assert (f"[Errno {code}] {text}" in done.stderr) == said, done.stderr
    assert done.returncode == (1 if where == "main" else 0)


def test_what_may_pass_is_status_1_which_launchers_restart(capsys: pytest.CaptureFixture[str]) -> None:
    assert (fail(TransientError("the store is busy")), fail(UserError("no such file"))) == (1, 2)
    assert capsys.readouterr().err == "error: the store is busy\nerror: no such file\n"
    full = [unwritable("/disk/a", OSError(code, os.strerror(code))) for code in (errno.ENOSPC, errno.EACCES)]
    assert [exit_status(error) for error in full] == [1, 2]


@pytest.mark.parametrize(("size", "saves"), [("64k", False), ("700k", True)])
def test_a_full_disk(tiny_npz: Path, tmp_path: Path, size: str, saves: bool) -> None:
    """One line, and what was saved before is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        more = ["--config.train.steps=200", "--config.checkpoint.keep=50"]
        done = run_main(f"--config={TINY}:{tiny_npz}", f"--workdir={disk / 'run'}", *more)
        with Checkpoints(disk / "run") as checkpoints:
            newest = checkpoints.latest_step()
            assert newest in (range(8, 200, 8) if saves else (None,))
            for step in checkpoints.steps():
                checkpoints.arrays(step)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    line = done.stderr.strip()
    assert re.search("No space left on device|RESOURCE_EXHAUSTED", line)
    assert line.startswith(f"error: {disk / 'run'}")
    assert not saves or f"the newest whole one is of step {newest}" in line


def test_a_poor_environment_is_enough(tiny_npz: Path, tmp_path: Path) -> None:
    env = main_env() | {"LC_ALL": "C", "TMPDIR": "/nowhere"}
    del env["HOME"]
    args = [f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path}", "--config.stop_after_steps=1"]
    done = programs.run(main_command(*args), env=env, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


if __name__ == "__main__":
    print("| | given | answer |\n|---|---|---|")
    for case in CASES:
        print(f"| {case.area} | {case.what} | {' … '.join(case.line)} |".replace("{tmp}", "TMP"))

"""What networks cost, against what is published of them, closed forms, and a trace of the whole network."""

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import programs
import pytest
from conftest import ROOT, main_env
from flax import nnx
from matplotlib.image import imread

from jax_resnet.commands import summarize
from jax_resnet.commands.summarize import count
from jax_resnet.errors import UserError
from jax_resnet.models.cost import cost
from jax_resnet.models.zoo import ZOO, create_model


def millions(parts):
    total = parts[0]
    return total.parameters / 1e6, total.multiply_adds / 1e6, total.activations / 1e6


def in_full(name, size, classes):
    """Parameters, multiply-adds and activations of the network traced as a whole, block by block."""
    rngs = SimpleNamespace(params=lambda: jax.random.key(0))  # nnx.Rngs would take minutes for the deepest
    model = nnx.eval_shape(lambda: create_model(name, num_classes=classes, rngs=rngs))
    model.eval()
    counted = cost(lambda model, x: model(x), model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))), counted.multiply_adds, counted.activations


def totals(parts):
    return dataclasses.astuple(parts[0])[3:]


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds", "activations"),
    [  # all in millions, at 224 px: the first two from torchvision's documentation, the last from timm's model cards
        ("resnet18", 11.690, 1814, 2.48),
        ("resnet34", 21.798, 3664, 3.74),
        ("resnet50", 25.557, 4089, 11.11),
        ("resnet101", 44.549, 7801, 16.23),
        ("resnet152", 60.193, 11514, 22.56),
        ("resnext50_32x4d", 25.029, 4230, 14.40),
        ("wide_resnet50_2", 68.883, 11398, 14.40),
    ],
)
def test_published_by_torchvision_and_timm(name, parameters, multiply_adds, activations):
    found = millions(count(name))
    assert found[0] == pytest.approx(parameters, abs=0.0005)
    assert found[1] == pytest.approx(multiply_adds, abs=0.5)
    assert found[2] == pytest.approx(activations, abs=0.005)


@pytest.mark.parametrize(
    ("name", "size", "parameters", "gmacs", "activations"),
    [  # from the table of sizes and speeds in the cards of timm's ResNets
        ("ecaresnet26t", 256, 16.0, 3.4, 10.5),
        ("ecaresnet50d_pruned", 224, 19.9, 2.5, 6.4),
        ("ecaresnet269d", 320, 102.1, 41.5, 83.7),
        ("ecaresnetlight", 224, 30.2, 4.1, 8.4),
        ("resnet18d", 288, 11.7, 3.4, 5.4),
        ("resnet50s", 224, 25.7, 5.5, 13.5),
        ("resnetaa50", 224, 25.6, 5.2, 11.6),
        ("resnetrs50", 160, 35.7, 2.3, 6.2),
        ("resnetrs420", 416, 191.9, 108.4, 213.8),
        ("resnext101_32x32d", 224, 468.5, 87.3, 91.1),
        ("senet154", 224, 115.1, 20.8, 38.7),
        ("seresnext101_64x4d", 224, 88.2, 15.5, 31.2),
        ("seresnextaa101d_32x8d", 224, 93.6, 17.2, 34.2),
        ("wide_resnet101_2", 176, 126.9, 14.3, 13.2),
    ],
)
def test_published_by_timm(name, size, parameters, gmacs, activations):
    found = millions(count(name, image_size=size))
    norms = 2 * found[2]  # which theirs counts as two operations on each number that a convolution gives
    assert found[0] == pytest.approx(parameters, abs=0.05)
    assert (found[1] + norms) / 1000 == pytest.approx(gmacs, abs=0.06)
    assert found[2] == pytest.approx(activations, abs=0.05)


def test_every_part_of_a_cifar_network():
    """He et al. 2015, section 4.2: 3×3 convolutions of 16, 32 and 64 channels on 32, 16 and 8 pixels a side."""
    found = [dataclasses.astuple(part) for part in count("cifar_resnet32")[1:]]
    expected = [("stem", (32, 32, 16), 0, 27 * 16 + 2 * 16, 32**2 * 27 * 16, 32**2 * 16)]
    before = 16
    for stage, (side, width) in enumerate([(32, 16), (16, 32), (8, 64)], 1):
        kernels = 9 * before * width + 9 * 9 * width**2  # of 10 convolutions, each with a scale and a bias
        outputs = 10 * side**2 * width
        shape = (side, side, width)
        expected.append((f"stage{stage}", shape, 5, kernels + 10 * 2 * width, side**2 * kernels, outputs))
        before = width
    assert found == [*expected, ("head", (10,), 0, 650, 640, 10)]


def test_the_last_norm_of_a_preactivation_network_is_counted():
    *_, norm, head = count("resnetv2_50", num_classes=7)
    assert (norm.name, norm.parameters, norm.multiply_adds) == ("norm", 2 * 2048, 0)
    assert (head.name, head.parameters) == ("head", 7 * 2048 + 7)
    assert (head.multiply_adds, head.activations) == (7 * 2048, 7)


KINDS = [  # every kind of block, attention and norm, deep enough for blocks to be left out, and one pruned
    "cifar_resnet44",
    "ecaresnet50d_pruned",
    "resnet34d",
    "resnetrs50",
    "resnetv2_50d_frn",
    "resnetv2_50x1_bit",
    "senet154",
    "wrn_40_2",
]


@pytest.mark.parametrize("name", KINDS)
def test_blocks_left_out_are_counted(name):
    assert totals(count(name, image_size=96, num_classes=10)) == in_full(name, 96, 10)


def test_what_is_not_given_suits_the_network():
    for name, image, classes in (("resnet18", (224, 224, 3), 1000), ("wrn_10_1", (32, 32, 3), 10)):
        network, *_, head = count(name)
        assert (network.shape, head.shape) == (image, (classes,))


def test_what_is_given():
    grey, stem, *stages, head = count("resnet18", image_size=65, num_classes=5, in_channels=1)
    assert grey.shape == (65, 65, 1)
    assert [p.shape for p in (stem, *stages)] == [(17, 17, 64), (17, 17, 64), (9, 9, 128), (5, 5, 256), (3, 3, 512)]
    assert stem.parameters == 49 * 64 + 2 * 64
    assert stem.multiply_adds == 33**2 * 49 * 64
    assert (head.shape, head.parameters) == ((5,), 513 * 5)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["summarize", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "100")
    summarize.main()


def rows(text):
    """The cells of a table's rows, its header left out."""
    return [line.split() for line in text.splitlines()[1:]]


def test_table_of_one_network(monkeypatch, capsys):
    run(monkeypatch, "resnet50")
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == ["shape", "blocks", "parameters", "GMACs", "activations"]
    assert rows(text)[0] == ["resnet50", "224×224×3", "16", "25,557,032", "4.089184", "11,114,984"]
    assert rows(text)[1] == ["stem", "56×56×64", "0", "9,536", "0.118014", "802,816"]
    assert [row[0] for row in rows(text)] == ["resnet50", "stem", "stage1", "stage2", "stage3", "stage4", "head"]
    assert rows(text)[4] == ["stage3", "14×14×1024", "6", "7,098,368", "1.464336", "2,157,568"]
    columns = [[float(c.replace(",", "")) for c in row[-4:]] for row in rows(text)]
    assert columns[0] == pytest.approx([sum(c) for c in zip(*columns[1:], strict=True)], abs=5e-6)


SOME = ["resnext50_32x4d", "resnet50", "wrn_28_10", "resnet101", "resnet18"]


@pytest.fixture
def some(monkeypatch):
    monkeypatch.setattr(summarize, "ZOO", {name: ZOO[name] for name in SOME})


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        ([], ["resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wrn_28_10"]),
        (["--sort=params"], ["resnet18", "resnext50_32x4d", "resnet50", "wrn_28_10", "resnet101"]),
        (["--sort=gmacs"], ["resnet18", "resnet50", "resnext50_32x4d", "wrn_28_10", "resnet101"]),
        (["--sort", "activations"], ["resnet18", "wrn_28_10", "resnet50", "resnext50_32x4d", "resnet101"]),
    ],
)
def test_table_of_all(monkeypatch, capsys, some, flags, order):
    run(monkeypatch, "--all", *flags)
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == order
    assert ["resnet50", "224×224×3", "16", "25,557,032", "4.089184", "11,114,984"] in found


def test_image_size_of_all(monkeypatch, capsys, some):
    run(monkeypatch, "--all", "--image-size=64", "--in-channels=1", "--num-classes=2")
    found = {row[0]: row for row in rows(capsys.readouterr().out)}
    assert {row[1] for row in found.values()} == {"64×64×1"}
    assert found["resnet18"][3] == f"{count('resnet18', num_classes=2, in_channels=1)[0].parameters:,}"


def test_picture(monkeypatch, capsys, some, tmp_path):
    file = tmp_path / "zoo.png"
    run(monkeypatch, "--all", f"--plot={file}")
    assert imread(file).shape == (840, 1080, 4)
    assert len(rows(capsys.readouterr().out)) == len(SOME)


def test_names_of_the_picture_are_those_of_networks():
    assert set(summarize.NAMED) <= ZOO.keys()


def test_picture_that_cannot_be_written(some, tmp_path):
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        summarize.draw(count("resnet18", image_size=32)[:1], tmp_path)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "give a network, for example resnet50, or --all"),
        (["resnet50", "--all"], "give a network, for example resnet50, or --all"),
        (["resnet50", "resnet18"], "unrecognized arguments: resnet18"),
        (["resnet5o"], "model 'resnet5o': unknown name; did you mean resnet50?"),
        (["cifar_resnet21"], "6n+2 layers; the nearest depth is 20"),
        (["resnet50", "--image_sise=3"], "--image_sise: no such flag; did you mean --image_size?"),
        (["resnet50", "--image=64"], "--image: no such flag"),
        (["resnet50", "--image_size"], "--image_size"),
        (["resnet50", "--image_size=0"], "--image_size=0: must be a whole number, from 1"),
        (["resnet50", "--image-size=1e3"], "--image_size=1e3: must be a whole number, from 1"),
        (["resnet50", "--num_classes=-1"], "--num_classes=-1: must be a whole number"),
        (["resnet50", f"--in_channels={10**30}"], "must be a whole number, from 1 to 999999999"),
        (["resnet50", "--image_size=31"], "model 'resnet50': images of 31 px are too small; the least is 32"),
        (["--all", "--image_size=31"], "images of 31 px are too small; the least is 32"),
        (["--all", "--sort=parms"], "--sort: unknown name 'parms'; did you mean params?"),
        (["resnet50", "--sort=params"], "--sort and --plot: only with --all"),
        (["resnet50", "--plot=a.png"], "--sort and --plot: only with --all"),
        (["--all", "--plot=a.pdf"], "--plot=a.pdf: must end in .png"),
        (["--all", "--plot=/no/such/a.png"], "--plot=/no/such/a.png: cannot be written; is /no/such a folder"),
    ],
)
def test_mistakes(monkeypatch, capsys, args, line):
    with pytest.raises(UserError) as error:
        run(monkeypatch, *args)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def command(*args, **env):
    return programs.run(
        [sys.executable, "-m", "jax_resnet", "summarize", *args],
        env=main_env() | env,
        cwd=ROOT,
    )


def test_command_touches_no_device():
    done = command("cifar_resnet20", JAX_PLATFORMS="none_such")  # any use of a device would fail
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)[0][:2] == ["cifar_resnet20", "32×32×3"]


def test_command_without_a_network():
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: give a network, for example resnet50, or --all\n"


@pytest.mark.soak
def test_command_for_the_whole_zoo(tmp_path):
    done = command("--all", f"--plot={tmp_path / 'zoo.png'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(row[0] for row in rows(done.stdout)) == sorted(ZOO)
    assert imread(tmp_path / "zoo.png").shape == (840, 1080, 4)

"""The package as it is installed: configs in the wheel, no heavy import for a typing error, small main."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, main_env

import jax_resnet
from jax_resnet.config import command_line


@pytest.mark.slow
def test_wheel_brings_its_configs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("jax_resnet_training-*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert not (site / "configs").exists()  # in the package, not beside it, where they might meet another's
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jax_resnet.main",
            "--config",
            "configs/resnet20_digits.py",
            "--config.stop_after_steps=1",
            f"--config.data.data_dir={tmp_path / 'tfds'}",
        ],
        env=main_env() | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "stopped after step 1" in done.stdout


def test_importing_the_package_loads_no_jax() -> None:
    code = "import sys, jax_resnet, jax_resnet.main; print('jax' in sys.modules, 'tensorflow_datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=main_env(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="create_modle"):
        jax_resnet.create_modle  # noqa: B018


def test_a_command_in_the_folder_of_the_configs() -> None:
    """Python looks for packages there first: no config may have the name of one that JAX tries to import."""
    command = [
        sys.executable,
        "-m",
        "jax_resnet.main",
        "--config=resnet20_digits.py",
        "--config.data.name=npz:none.npz",
    ]
    done = subprocess.run(command, env=main_env(), cwd=ROOT / "configs", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "none.npz" in done.stderr


def test_configs_of_another_distribution_do_not_shadow_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in site-packages, where a folder configs/ may lie beside the package."""
    for folder in (tmp_path / "configs", tmp_path / "jax_resnet" / "configs"):
        folder.mkdir(parents=True)
        (folder / "resnet20_digits.py").touch()
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "jax_resnet" / "config" / "command_line.py"))
    monkeypatch.chdir(tmp_path / "jax_resnet")
    assert command_line.find_config("resnet20_digits") == str(
        tmp_path / "jax_resnet" / "configs" / "resnet20_digits.py"
    )


@pytest.mark.parametrize(
    ("args", "status", "out", "err"),
    [
        ([], 0, "prepare      write a dataset once", ""),
        (["--help"], 0, "usage: jax-resnet COMMAND", ""),
        (["exprot"], 2, "", "error: exprot: no such command; did you mean export?"),
        (["train", "--wokrdir=x"], 2, "", "error: --wokrdir: no such flag; did you mean workdir?"),
        (["eval"], 2, "", "error: --config is missing"),
        (["average", "--wrkdir=x"], 2, "", "error: "),
    ],
)
def test_the_front_door(args: list[str], status: int, out: str, err: str) -> None:
    code = "import sys; from jax_resnet.__main__ import main\n" + (
        "try: main()\nfinally: print('jax' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], env=main_env(), capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert out in done.stdout
    assert err in done.stderr
    if args[:1] != ["average"]:
        assert "False" in done.stderr.splitlines()  # JAX was not waited for

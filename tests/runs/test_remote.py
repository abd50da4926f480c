"""Workdirs in an object store: a whole run against moto's S3 server, through tensorstore and fsspec."""

import http.server
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
from conftest import ROOT, main_command, main_env, run_main
from ml_collections import ConfigDict
from orbax.checkpoint._src.serialization import tensorstore_utils
from workdirs import final_state

from jax_resnet.commands.status import exit_status
from jax_resnet.errors import UserError
from jax_resnet.inference.safetensors import export
from jax_resnet.runs import paths, s3
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.metrics_reader import read_metrics
from jax_resnet.runs.paths import COMMITTED, AnyPath, move, names, open_path, read, write
from jax_resnet.training.evaluate import evaluate_checkpoint
from jax_resnet.training.loop import train
from jax_resnet.training.pretrained import read_weights

TINY = ROOT / "tests" / "tiny.py"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """s3://BUCKET on a server of this test's own, of which the environment tells."""
    pytest.importorskip("s3fs", reason="needs s3fs and moto[s3,server]")
    server = pytest.importorskip("moto.server", reason="needs moto[s3,server]").ThreadedMotoServer(
        "127.0.0.1", 0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("AWS_")]:
            patch.delenv(key)
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        open_path("s3://runs/any")  # no listing is remembered
        import s3fs

        s3fs.S3FileSystem().mkdir("runs")
        yield "s3://runs"
    server.stop()


@pytest.mark.curves
def test_a_run_in_an_object_store_is_the_run_in_a_folder(
    bucket: str, tiny_config: ConfigDict, tiny_npz: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped at 10, its save cut short, and gone on with by the command, in another process, from 8."""
    whole = train(tiny_config, tmp_path)
    url = f"{bucket}/resumed"
    workdir = open_path(url)
    tiny_config.stop_after_steps = 10
    capfd.readouterr()
    train(tiny_config, url)
    printed = capfd.readouterr()
    assert f"saved in {url}" in printed.out
    assert printed.err == ""  # neither tensorstore nor boto complains
    assert read_metrics(workdir)[-1]["step"] == 10
    (workdir / "checkpoints" / "10" / COMMITTED).unlink()
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [8]
    done = run_main(f"--config={TINY}:{tiny_npz}", f"--workdir={url}")
    assert done.returncode == 0, done.stderr
    assert "from step 8" in done.stdout

    ours, theirs = final_state(workdir), final_state(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    rows = [[r | {"seconds": 0} for r in read_metrics(w) if r["kind"] == "eval"] for w in (workdir, tmp_path)]
    assert rows[0] == rows[1]
    assert [r["step"] for r in read_metrics(workdir) if r["kind"] == "train"] == [1, 5, 8, 9, 10, 15, 16, 20]
    assert json.loads(read(workdir / "result.json"))["splits"] == whole["splits"]
    assert set(names(workdir)) == {path.name for path in tmp_path.iterdir()} - {"lock"}
    assert len(names(workdir / "tensorboard" / "train")) == 2  # one of each process
    assert sorted(names(workdir / "checkpoints")) == ["16", "20"]  # older ones are deleted, all of each

    assert evaluate_checkpoint(url)["splits"] == evaluate_checkpoint(tmp_path)["splits"]
    there, here = export(url)[0], export(tmp_path)[0]
    assert str(there) == f"{url}/export/model.safetensors"
    assert read(there) == here.read_bytes()
    known = read_weights(str(tmp_path)).tensors
    for source in (url, f"{url}/export", f"{url}/export/model.safetensors"):
        found = read_weights(source).tensors
        assert {name: x.tobytes() for name, x in found.items()} == {name: x.tobytes() for name, x in known.items()}

    tiny_config.optimizer.momentum = 0.5
    with pytest.raises(UserError, match=r"holds a run of another config \(optimizer\.momentum"):
        train(tiny_config, url)


def test_a_bucket_that_is_not_there_is_one_line_and_is_not_made(bucket: str, tiny_config: ConfigDict) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"^s3://mistyped/run/config\.json: cannot be written .*bucket") as e:
            train(tiny_config, "s3://mistyped/run")
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no run has been begun here"):
        evaluate_checkpoint("s3://mistyped/run")


def test_refused_credentials_are_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    async def refused(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3fs.S3FileSystem, "_lsdir", refused)
    with pytest.raises(UserError, match=r"^s3://runs/run: cannot be read \(Access Denied\); check .* credentials") as e:
        names(open_path("s3://runs/run"))
    assert exit_status(e.value) == 2


class Busy(http.server.BaseHTTPRequestHandler):
    """A store that answers 503 to everything."""

    def answer(self) -> None:
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_HEAD = do_PUT = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_that_is_busy_may_be_back(bucket: str, tiny_npz: Path) -> None:
    """One line, and the status at which launchers start the run again."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    env = main_env() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_MAX_ATTEMPTS": "1"}
    done = programs.run(main_command(f"--config={TINY}:{tiny_npz}", "--workdir=s3://runs/busy"), env=env)
    server.shutdown()
    server.server_close()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("error: s3://runs/busy")
    assert "the store or the network may be back" in done.stderr


@pytest.mark.parametrize("where", ["local", "s3"])
def test_move(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    top: AnyPath = tmp_path if where == "local" else open_path(f"{request.getfixturevalue('bucket')}/moves")
    if where == "local":
        (top / "8" / "state").mkdir(parents=True)
    for name, content in (("8/state/a", b"x"), (f"8/{COMMITTED}", b"y"), ("80", b"z")):
        write(top / name, content)
    move(top / "8", top / "damaged-8")
    assert sorted(names(top)) == ["80", "damaged-8"]
    assert read(top / "damaged-8" / "state" / "a") == b"x"
    assert read(top / "damaged-8" / COMMITTED) == b"y"
    move(top / "80", top / "81")
    assert (read(top / "81"), sorted(names(top))) == (b"z", ["81", "damaged-8"])
    with pytest.raises(FileExistsError):
        move(top / "81", top / "damaged-8")
    with pytest.raises((FileNotFoundError, UserError)):
        move(top / "nothing", top / "there")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_what_is_to_be_installed(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda _: None)
    extra = {"gs": "gcs", "s3": "s3"}[scheme]
    with pytest.raises(UserError, match=rf"^{scheme}://b/run: .*pip install 'jax-resnet-training\[{extra}\]'$"):
        open_path(f"{scheme}://b/run")


@pytest.mark.parametrize(("url", "fault"), [
    ("az://bucket/run", "gs://… or s3://…"), ("http://host/run", "gs://… or s3://…"),
    ("gs://bucket", "must name a bucket and a folder"), ("s3:///run", "must name a bucket and a folder"),
])  # fmt: skip
def test_urls_that_are_no_workdir(url: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        open_path(url)


@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax_asks_tensorstore_for_s3_as_for_gs(ocdbt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where s3fs is not installed: this is what a new Orbax may change."""
    monkeypatch.setattr(s3, "driver", lambda: {"driver": "s3", "aws_region": "there"})
    s3.teach_orbax()
    s3.teach_orbax()
    build = tensorstore_utils.build_kvstore_tspec
    specs = [build(f"{scheme}://bucket/run/8/state", "head", use_ocdbt=ocdbt) for scheme in ("gs", "s3")]
    base = specs[1]["base"] if ocdbt else specs[1]
    place = "run/8/state" if ocdbt else "run/8/state/head"
    assert base == {"driver": "s3", "aws_region": "there", "bucket": "bucket", "path": place}
    base.update({"driver": "gcs"})
    del base["aws_region"]
    assert specs[0] == specs[1]
    assert "file" in str(build("/here/state", "head", use_ocdbt=ocdbt))

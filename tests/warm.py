"""Python that has imported the heavy libraries once and forks for each command.

    Warm().run(["papermill", "nbs/leaf/80_row.ipynb", ...], cwd, environment, timeout)

A server without threads imports torch and the like, then reads one command a line; each is run by
a forked child in a session of its own, with its own folder, environment and output files. The
child is what a fresh interpreter would be seven CPU seconds later: nothing of this repository is
loaded. But what libraries read from the environment while they are imported was read in the
server: whoever sets such a variable (TRITON_INTERPRET) must start cold. `papermill` gets its
kernel from a second fork.
"""

import atexit
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

LIBRARIES = (
    "torch",
    "lightning.pytorch",
    "torchvision.transforms.v2",
    "timm",
    "torchmetrics.classification",
    "matplotlib.pyplot",
    "pandas",
    "seaborn",
    "scipy.ndimage",
    "sklearn.metrics",
    "IPython",
    "papermill",
    "papermill.cli",
    "ipykernel.kernelapp",
    "nbdev.test",
    "torch.utils.tensorboard",
    "torch.utils.flop_counter",
    "imagehash",
)


class Warm:
    """A server, started when it is first needed; one command at a time."""

    def __init__(self):
        self.server, self.cpu = None, 0.0  # CPU seconds of all commands so far

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST")}
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        if self.answer(1800) != "ready":
            raise RuntimeError("the warm Python did not start: its error is on the screen")

    def answer(self, timeout: float):
        """The next line that the server says, None when none came in time."""
        ready, _, _ = select.select([self.server.stdout], [], [], timeout)
        return json.loads(self.server.stdout.readline() or "null") if ready else None

    def run(
        self, command: list[str], cwd: Path, environment: dict, timeout: float
    ) -> subprocess.CompletedProcess:
        """Like subprocess.run with captured text; a timeout ends the command's whole session."""
        if self.server is None or self.server.poll() is not None:
            self.start()
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / name) for name in ("out", "err")]
            job = {"command": command, "cwd": str(cwd), "environment": environment, "files": files}
            print(json.dumps(job), file=self.server.stdin, flush=True)
            pid = self.answer(600)
            ended = self.answer(timeout) if pid else None
            if self.server.poll() is not None:
                raise RuntimeError(f"the warm Python ended by itself during {command[:3]}")
            if ended is None:
                os.killpg(pid, signal.SIGKILL)
                self.answer(60)
            said = [Path(file).read_text(errors="replace") for file in files]
        if ended is None:
            raise subprocess.TimeoutExpired(command, timeout, *said)
        self.cpu += ended[1]
        return subprocess.CompletedProcess(command, ended[0], *said)

    def stop(self) -> None:
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait(60)


class Forked:
    """As much of subprocess.Popen as jupyter_client wants to see of a kernel."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("kernel", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def lend_kernel() -> None:
    """Fork, while there are no threads, a process that becomes papermill's kernel."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        end_with_parent()
        os.setsid()
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        if not text:
            os._exit(0)  # papermill never asked
        job = json.loads(text)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        parent = job["environment"].get(
            "JPY_PARENT_PID", "0"
        )  # which ipykernel reads while it is imported
        sys.argv = [
            "ipykernel_launcher",
            *job["arguments"],
            f"--IPKernelApp.parent_handle={parent}",
        ]
        from ipykernel import kernelapp

        kernelapp.launch_new_instance()
        sys.exit(0)
    os.close(reading)

    def launch(command, env=None, cwd=None, **_):
        job = {
            "arguments": command[command.index("ipykernel_launcher") + 1 :],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(env or os.environ),
        }
        while os.getpgid(pid) != pid:  # jupyter_client asks for its group at once
            time.sleep(0.01)
        with os.fdopen(writing, "w") as pipe:
            json.dump(job, pipe)
        return Forked(pid)

    from jupyter_client.provisioning import local_provisioner

    local_provisioner.launch_kernel = launch


def execute(command: list[str]) -> None:
    """Be `python -c code`, `papermill …`: in this process, as the main program."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    program, *arguments = command
    if Path(program).name == "papermill":
        lend_kernel()
        from papermill.__main__ import papermill

        sys.argv = command
        papermill()
    else:
        assert arguments[0] == "-c", command
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)


def serve() -> dict:
    """Answer commands; returns only in a forked child, with what it has to do."""
    for name in LIBRARIES:
        __import__(name)
    gc.collect()
    gc.freeze()  # children look for garbage among their own objects only
    say("ready")
    while True:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        say(pid)
        _, status, used = os.wait4(pid, 0)
        say([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime])


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def leave(code: int) -> None:
    """End as the interpreter does, without taking the libraries apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say(what) -> None:
    os.write(ANSWERS, (json.dumps(what) + "\n").encode())


if __name__ == "__main__":
    ANSWERS = os.dup(1)
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    sys.path[0] = ""
    os.chdir("/")
    end_with_parent()
    job = serve()
    end_with_parent()
    os.close(ANSWERS)
    os.setsid()
    for number, where in ((0, os.devnull), (1, job["files"][0]), (2, job["files"][1])):
        file = os.open(where, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.path[:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        execute(job["command"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(int(code))

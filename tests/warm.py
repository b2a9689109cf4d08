"""The tests' warm process: the heavy libraries are loaded, nothing of this repository is.

    Warm().run(["papermill", "nbs/leaf/80_row.ipynb", ...], cwd, environment, timeout)

What libraries read from the environment while they are imported was read when the process started:
whoever sets such a variable (TRITON_INTERPRET) must start cold. See `leansense.core.warm`.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from leansense.core import warm

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
        hidden = ("PYTHONPATH", "IN_TEST")
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        self.server, self.cpu = warm.Warm(LIBRARIES, environment), 0.0  # CPU seconds of all so far

    def run(
        self, command: list[str], cwd: Path, environment: dict, timeout: float
    ) -> subprocess.CompletedProcess:
        """Like subprocess.run with captured text; a timeout ends the command's whole session."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            self.server.submit({"command": command}, environment, cwd, out, err, timeout)
            ended = self.server.ended()
            said = [file.read_text(errors="replace") for file in (out, err)]
        if ended.late:
            raise subprocess.TimeoutExpired(command, timeout, *said)
        self.cpu += ended.cpu
        return subprocess.CompletedProcess(command, ended.code, *said)

    def stop(self) -> None:
        self.server.close()

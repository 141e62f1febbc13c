"""One virtual environment for each peer, made when it is first asked for and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch>=2.8,<2.14"
COMMON = ("numpy", "safetensors", "pillow")
PINNED = {
    "brevitas": ("brevitas==0.13.4", "onnx==1.23.2", "onnxscript==0.7.2", "onnxoptimizer==0.4.2"),
    "modelopt": ("nvidia-modelopt==0.47.0", "requests", "huggingface_hub"),
    "nncf": ("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
    "torchao": ("torchao==0.18.0",),
}
"""The peer, pinned, then what it imports without asking for it, to train or to export."""


def default_folder() -> Path:
    """Where environments are kept unless an option says otherwise: the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sqakd-fx" / "peers"


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, which is made where it is not there or lacks a package.

    torch is installed first, by itself, so that the build that is set up for this machine is taken.

    Raises:
        RuntimeError: pip fails; with the last line it said.
    """
    pin = PINNED[peer][0]
    home = folder / f"{peer}-{pin.rpartition('=')[2]}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    finished = home / "finished"
    wanted = "\n".join(PINNED[peer])
    if finished.exists() and finished.read_text() == wanted:
        return python
    print(f"making the environment of {pin} in {home}", file=sys.stderr, flush=True)
    if not finished.exists():
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
    for packages in ((TORCH,), (*COMMON, *PINNED[peer])):
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the environment of {peer} cannot be made: {said}")
    finished.write_text(wanted)
    return python

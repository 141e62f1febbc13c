"""The two packages of ONNX Runtime: `onnxruntime` and `onnxruntime-gpu` install into one folder, `onnxruntime`.

Where both are installed, files of the one that came last are used. Where one of them is uninstalled then, the
folder of the other is left without its files, and pip still says that all is well.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from sqakd_fx.errors import SqakdError

PACKAGES = ("onnxruntime-gpu", "onnxruntime")


def installed_runtimes() -> dict[str, str]:
    """Name to version of those that pip has installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def clash(installed: Sequence[str]) -> str | None:
    """What is wrong where both are installed, and what to do; None elsewhere."""
    if len(installed) < 2:
        return None
    return (
        "both use the folder onnxruntime: the one installed last runs, and uninstalling either breaks the other; "
        "keep one: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install the one you want"
    )


def require_whole(module: ModuleType) -> None:
    """Raise SqakdError where `module`, the imported onnxruntime, has lost its files."""
    if hasattr(module, "InferenceSession"):
        return
    named = next(iter(installed_runtimes()), PACKAGES[0])
    raise SqakdError(
        "ONNX Runtime's files are gone, as happens where onnxruntime and onnxruntime-gpu were both installed and one "
        f"was uninstalled: pip install --force-reinstall --no-deps {named}"
    )

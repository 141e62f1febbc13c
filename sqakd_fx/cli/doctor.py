"""`doctor` and `capabilities`: what is installed, and what the installed ONNX Runtime does."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import onnxruntime
import torch
from rich.table import Table

from sqakd_fx.diagnostics.terminal import console
from sqakd_fx.engine.compilation import has_compiler
from sqakd_fx.runtime.capabilities import starts, table
from sqakd_fx.runtime.packages import clash, installed_runtimes
from sqakd_fx.runtime.session import overflows
from sqakd_fx.targets import TARGETS


def show_doctor() -> None:
    """Print what is installed and what each missing thing costs."""
    answer = console()
    shown = Table("what", "found", "if it is missing")
    shown.add_row("Python", platform.python_version(), "")
    for name in ("sqakd-fx", "torch", "onnx", "onnxscript", "onnx-ir"):
        shown.add_row(name, _version(name), "nothing works")
    runtimes = installed_runtimes()
    for name in runtimes or ("onnxruntime-gpu",):
        shown.add_row(name, _version(name), "no validation")
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "–"
    shown.add_row("GPU", cuda, "training runs on the CPU, 10 to 100 times slower")
    found = ", ".join(
        p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()
    )
    shown.add_row("ONNX Runtime providers", found, "without CUDA, validation runs on the CPU")
    dot_products = "–" if overflows() else "yes"
    need = 'files of weight_range = "full" are wrong here; those of the default are not'
    shown.add_row("8-bit dot products in ONNX Runtime", dot_products, need)
    compiler = "yes" if has_compiler(torch.device("cpu")) else "–"
    shown.add_row("C++ compiler", compiler, "training runs uncompiled, about half as fast")
    answer.print(shown)
    problem = clash(list(runtimes))
    if problem is not None:
        answer.print(f"{' and '.join(runtimes)}: {problem}", soft_wrap=True)


def show_targets() -> None:
    """Print the rows of `TARGETS`: what is trained and written for each, and what has been run on it."""
    shown = Table("--target", "runtime", "file", "8-bit activations", "installed", "run so far")
    for name, target in TARGETS.items():
        file = target.profile or "container, packed or typed"
        grids = "signed" if target.signed else "any"
        found = onnxruntime.__version__ if name == "onnxruntime" else _version(target.package)
        shown.add_row(name, target.title, file, grids, found, target.seen)
    console().print(shown)


def show_capabilities() -> None:
    """Print what each provider of the installed ONNX Runtime does with each form of an operation."""
    show_targets()
    available = onnxruntime.get_available_providers()
    columns = {provider: table(provider) for provider in available if starts(provider)}
    answer = console()
    shown = Table("form", *(provider.removesuffix("ExecutionProvider") for provider in columns))
    for form in next(iter(columns.values()), {}):
        shown.add_row(form, *(answers[form].value for answers in columns.values()))
    answer.print(f"ONNX Runtime {onnxruntime.__version__}")
    answer.print(shown)
    for provider in available:
        if provider not in columns:
            answer.print(f"{provider} does not start here")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"

"""Size and latency of exported models: ours, the float model, onnxruntime's quantize_static, NNCF, Brevitas.

    python benchmarks/deploy.py [GLOB ...] [--seconds S]

Batch 1 and 32, 1 and 2 threads; the models of a row take turns, and medians are shown. Weights and inputs
are random, except those of ResNet-20 where they are found: latency does not depend on them. torchvision
and timm are needed for all but ResNet-20. NNCF quantizes the same float ONNX model; Brevitas exports the same
architecture as `plain.py` writes it. Each does so in an environment of its own (`peers/`); one that fails is
a row that says why.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from any_model import settle, versions
from chosen import chosen
from networks import NETWORKS
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from peers.client import Worker, WorkerFailed
from peers.environment import default_folder
from resnet20 import resnet20
from torch import Tensor, nn

from sqakd_fx.errors import ParityError
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export_job
from sqakd_fx.runtime.fusion import fusion_report
from sqakd_fx.runtime.session import session

MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet20": lambda: (resnet20(), torch.randn(8, 3, 32, 32)),
    "resnet18": lambda: (_settled("torchvision/resnet18"), torch.randn(4, 3, 224, 224)),
    "mobilenet_v2": lambda: (_settled("torchvision/mobilenet_v2"), torch.randn(4, 3, 224, 224)),
    "vit_tiny": lambda: (_settled("timm/vit_tiny_patch16_224"), torch.randn(4, 3, 224, 224)),
}


PEERS = ("nncf", "brevitas")


def _settled(name: str) -> nn.Module:
    return settle(*NETWORKS[name]())


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives a batch once."""

    def __init__(self, name: str, images: Tensor) -> None:
        self.rows: Iterator[dict[str, Any]] = iter([{name: images.numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rows, None)


def export_all(model: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """Every model of a row, by name."""
    from sqakd_fx.exporters.profiles import write_profile

    paths = {}
    for bits, profile in (("w8a8", "container"), ("w4a4", "packed"), ("w2a2", "packed")):
        recipe = resolve_recipe(bits)
        program = build_program(model, images, recipe)
        calibrate(program.student, [(images,)], method="minmax")
        job = export_job(lower(program.student).graph_module, program)
        name = f"ours {bits} {profile}"
        paths[name] = write_profile(profile, job, folder / f"{bits}.onnx").path
        if "float" not in paths:
            paths["float"] = write_profile("float", job, folder / "float.onnx").path
    ready, static = folder / "ready.onnx", folder / "static.onnx"
    quant_pre_process(str(paths["float"]), str(ready), skip_symbolic_shape=True)
    given = onnx.load(str(ready)).graph.input[0].name
    quantize_static(
        str(ready),
        str(static),
        Reader(given, images),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return paths | {"quantize_static": static}


def export_peers(
    network: str, images: Tensor, float_file: Path, folder: Path, environments: Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Models that peers export in their own environments by name, and why others did not."""
    paths, reasons = {}, {}
    given = folder / "images.pt"
    torch.save(images, given)
    for peer in PEERS:
        into = folder / f"{peer}.onnx"
        setup = {
            "do": "export",
            "network": network,
            "images": str(given),
            "float": str(float_file),
            "into": str(into),
        }
        try:
            worker = Worker(peer, environments, f"{network} {peer} export", setup)
            try:
                worker.receive()
            finally:
                worker.close()
            session(into)
        except (WorkerFailed, RuntimeError, ParityError) as error:
            reasons[peer] = str(error)
        else:
            paths[peer] = into
    return paths, reasons


def latencies(
    paths: dict[str, Path], shape: tuple[int, ...], threads: int, seconds: float
) -> dict[str, float]:
    """Median milliseconds of one call; the models take turns."""
    sessions = {}
    for name, path in paths.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # sessions that wait their turn must not spin on the cores of the one that is timed
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        sessions[name] = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    feeds = {n: {s.get_inputs()[0].name: images} for n, s in sessions.items()}
    for name, running in sessions.items():
        running.run(None, feeds[name])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["float"]) < 5:
        for name, running in sessions.items():
            started = time.perf_counter()
            running.run(None, feeds[name])
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}


def float_operators(path: Path) -> str:
    """What the runtime's optimized graph computes in float: layers, products, sums."""
    with tempfile.TemporaryDirectory() as folder:
        heavy = fusion_report(path, Path(folder)).float_heavy
    counts = Counter(name.rpartition("(")[2].rstrip(")") for name in heavy)
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--environments", type=Path, default=default_folder())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{versions()}; {platform.processor() or platform.machine()}")
    for name in chosen(MODELS, options.globs):
        make = MODELS[name]
        torch.manual_seed(0)
        model, images = make()
        with tempfile.TemporaryDirectory() as folder:
            paths = export_all(model, images, Path(folder))
            peers, reasons = export_peers(
                name, images, Path(folder) / "ready.onnx", Path(folder), options.environments
            )
            paths |= peers
            columns = {
                f"b{batch} t{threads}": latencies(
                    paths, (batch, *images.shape[1:]), threads, options.seconds
                )
                for batch in (1, 32)
                for threads in (1, 2)
            }
            whole = paths["float"].stat().st_size
            print(f"\n## {name}\n")
            head = [f"{c} (ms) | ÷ static" for c in columns]
            print(f"| model | KiB | ÷ float | {' | '.join(head)} | in float |")
            print("|---|---|---|" + "---|---|" * len(columns) + "---|")
            for one, path in paths.items():
                size = path.stat().st_size
                cells = [
                    f"{c[one]:.2f} | {c[one] / c['quantize_static']:.2f}" for c in columns.values()
                ]
                print(
                    f"| {one} | {size / 1024:.0f} | {size / whole:.3f} | {' | '.join(cells)} | "
                    f"{float_operators(path)} |",
                    flush=True,
                )
            for peer, reason in reasons.items():
                print(f"| {peer} | {reason} |", flush=True)


if __name__ == "__main__":
    main()

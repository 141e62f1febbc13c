"""A process that trains one network in one way, a step when it is told to, as JSON lines on a pipe.

    python worker.py ADAPTER          (started by client.py, in the environment of a peer,
                                       with benchmarks/ on PYTHONPATH)

The first line that arrives says what to set up; each further line is a command. An adapter is a module
`ADAPTER_adapter` with `prepare(model, example, bits, calibration) -> nn.Module` and
`frozen(module) -> nn.Module`, or with a training loop of its own: `train(setup, batches)`. One that writes
ONNX files has `export(model, images, float_file, into)`: `float_file` is the float model as ONNX.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from distillation import rate_factor, take_step
from torch import Tensor

Setup = Mapping[str, Any]
REPORT_STEPS = 10
GPU_STEPS = 10
"""Steps that are timed together."""


class Pipe:
    """JSON lines; what libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def read(self) -> dict[str, Any]:
        """The next command; ends the process where the other side is gone."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        return json.loads(line)  # type: ignore[no-any-return]

    def write(self, **values: Any) -> None:
        self.out.write(json.dumps(values) + "\n")


def steps_on_demand(pipe: Pipe, images: Tensor, warm_up: int, baseline: int) -> Iterator[Tensor]:
    """The same batch again and again, when steps are asked for.

    Answers {"seconds"} a step when the loop comes back for another one (on a GPU after several, between
    which the host does not wait), {"bytes"} to "memory" (the most that was resident since the warm-up, above
    `baseline`), and {"kernels"} of a step to "kernels".
    """
    on_gpu = images.is_cuda
    started = time.perf_counter()
    for _ in range(warm_up):
        yield images
    _settle(on_gpu)
    pipe.write(ready=True, seconds=time.perf_counter() - started)
    while True:
        command = pipe.read()["do"]
        if command == "memory":
            pipe.write(bytes=_peak(on_gpu) - baseline)
        elif command == "kernels":
            with torch.profiler.profile() as profile:
                yield images
                _wait(on_gpu)
            kernels = [e for e in profile.events() or () if e.device_type.name == "CUDA"]
            pipe.write(kernels=len(kernels))
        else:
            steps = GPU_STEPS if on_gpu else 1
            started = time.perf_counter()
            yield from itertools.repeat(images, steps)
            _wait(on_gpu)
            pipe.write(seconds=(time.perf_counter() - started) / steps)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _settle(on_gpu: bool) -> None:
    """Give back what the warm-up left, and forget its peak."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak(on_gpu: bool) -> int:
    """Most bytes taken from the GPU (a CUDA graph's among them), or resident in memory, since `_settle`."""
    if on_gpu:
        return int(torch.cuda.max_memory_reserved())
    if sys.platform == "linux":
        return _resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def baseline_bytes(on_gpu: bool, compiles: bool) -> int:
    """What the process holds before there is a network: libraries, and the compiler where one is used."""
    if on_gpu:
        return 0
    if compiles:
        torch.compile(lambda x: (x * 2).relu().sum())(torch.ones(8, requires_grad=True)).backward()
    gc.collect()
    return _resident("VmRSS") if sys.platform == "linux" else 0


def timed(pipe: Pipe, adapter: Any, setup: Setup) -> None:
    """Serve steps on a fixed batch of random inputs."""
    from plain import NETWORKS, settled

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    baseline = baseline_bytes(device.type == "cuda", setup.get("compile", False))
    torch.manual_seed(0)
    images = NETWORKS[setup["network"]].inputs(setup["batch"])
    model = settled(setup["network"], images).to(device)
    images = images.to(device)
    batches = steps_on_demand(pipe, images, setup["warm_up"], baseline)
    if hasattr(adapter, "train"):
        adapter.train(setup, model, images, batches)
        return
    student = adapter.prepare(model, images, setup["bits"], [images])
    optimizer = torch.optim.Adam(student.parameters(), 1e-4, fused=True)
    for batch in batches:
        take_step(student, model, optimizer, batch)


def trained(pipe: Pipe, adapter: Any, setup: Setup) -> None:
    """Train on an image set, say how far it is, and end with the accuracy on the test images."""
    from image_sets import IMAGE_SETS

    data, folder, seed = IMAGE_SETS[setup["data"]], Path(setup["folder"]), setup["seed"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, labels = (x.to(device) for x in data.read("train", folder))
    teacher = data.teacher().to(device)
    torch.manual_seed(seed)
    first = data.epoch(pixels, labels, 0, seed)
    calibration = [next(first)[0] for _ in range(setup["calibration_batches"])]
    student = adapter.prepare(teacher, calibration[0], setup["bits"], calibration)
    rate, total, step = setup["learning_rate"], setup["steps"], 0
    optimizer = torch.optim.Adam(student.parameters(), rate, fused=True)
    loss = torch.zeros((), device=device)
    while step < total:
        for images, _ in data.epoch(pixels, labels, step // data.steps(), seed):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, total)
            loss = take_step(student, teacher, optimizer, images)
            step += 1
            if step % REPORT_STEPS == 0 or step == total:
                pipe.write(step=step, steps=total, loss=float(loss))
            if step == total:
                break
    frozen = adapter.frozen(student)
    pixels, labels = (x.to(device) for x in data.read("test", folder))
    right = 0
    with torch.no_grad():
        for images, wanted in zip(pixels.split(500), labels.split(500), strict=True):
            right += int((frozen(data.normalized(images)).argmax(1) == wanted).sum())
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu"
    pipe.write(accuracy=100 * right / len(pixels), loss=float(loss), device=name)


def exported(pipe: Pipe, adapter: Any, setup: Setup) -> None:
    """Write the 8-bit network as ONNX, calibrated on the given images; answers {"path"}."""
    from plain import settled

    images = torch.load(setup["images"])
    adapter.export(settled(setup["network"], images), images, setup["float"], setup["into"])
    pipe.write(path=setup["into"])


def main() -> None:
    pipe = Pipe()
    setup = pipe.read()
    try:
        adapter = importlib.import_module(f"{sys.argv[1]}_adapter")
        {"time": timed, "train": trained, "export": exported}[setup["do"]](pipe, adapter, setup)
    except Exception as error:
        import traceback

        traceback.print_exc()
        pipe.write(
            error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )


if __name__ == "__main__":
    main()

"""Networks as `pt2e` programs, lowered to ExecuTorch's XNNPACK backend and run on the CPU: one table.

    pip install executorch transformers
    python benchmarks/on_executorch.py [--bits w8a8 w4a4] [--networks NAME ...]

Each network is calibrated, not trained. What ExecuTorch computes stands beside the integer program, and beside the
same torch.export program in PyTorch. Milliseconds are the median of seven calls; × is against the float model, lowered
to XNNPACK as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from small_and_large import NAMES, network
from torch import Tensor, nn

from sqakd_fx.errors import SqakdError
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export

HEAD = (
    "network",
    "bits",
    "parts in XNNPACK",
    "other operations",
    "error to the integer program",
    "same predictions",
    "error in PyTorch",
    "KiB",
    "ms, × float",
)
CALLS = 7


def lowered_to_xnnpack(program: torch.export.ExportedProgram) -> tuple[Any, Counter[str]]:
    """The program as ExecuTorch runs it, and the operations that XNNPACK left to other kernels."""
    import executorch.kernels.quantized  # noqa: F401  (dequantizes the weights of layers in float)
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    calls = edge.exported_program().graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.executorch_call_delegate
    )
    names = [
        getattr(node.target, "__name__", str(node.target)).partition(".default")[0]
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function" and node not in calls and "getitem" not in str(node.target)
    ]
    return edge.to_executorch(), Counter({"delegate": len(calls), **Counter(names)})


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12))


def milliseconds(method: Any, example: list[Tensor]) -> float:
    """Of a call; the first is not counted."""
    took = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        method.execute(example)
        took.append(time.perf_counter() - start)
    return 1000 * statistics.median(took[1:])


def float_milliseconds(model: nn.Module, example: list[Tensor]) -> float | None:
    """Of the float model in XNNPACK; None where ExecuTorch refuses it."""
    from executorch.runtime import Runtime

    try:
        made, _ = lowered_to_xnnpack(torch.export.export(model, tuple(example)))
        method = Runtime.get().load_program(made.buffer).load_method("forward")
        return milliseconds(method, example)
    except Exception:
        return None


def row(name: str, bits: str, folder: Path) -> list[str]:
    """What ExecuTorch makes of one network."""
    from executorch.runtime import Runtime

    model, inputs = network(name)
    try:
        program = build_program(model, inputs, bits)
        example = program.traced.call.flatten(inputs, {})
        calibrate(program.student, [example], method="minmax")
        lowered = lower(program.student).graph_module
        path = export(program, lowered, folder / "model.pt2", target="executorch").path
    except SqakdError as refused:
        return [name, bits, f"not written: {refused}", *[""] * (len(HEAD) - 3)]
    loaded = torch.export.load(path)
    try:
        made, kernels = lowered_to_xnnpack(torch.export.export(loaded.module(), example))
        method = Runtime.get().load_program(made.buffer).load_method("forward")
        given = [x.contiguous() for x in example]
        found = method.execute(given)
    except Exception as refused:
        return [
            name,
            bits,
            f"ExecuTorch refuses it: {' '.join(str(refused).split())[:120]}",
            *[""] * (len(HEAD) - 3),
        ]
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(lowered(*example))
        in_torch = torch.utils._pytree.tree_leaves(loaded.module()(*example))
    pairs = list(zip(found, wanted, strict=True))
    same = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]
    took, in_float = milliseconds(method, given), float_milliseconds(model, given)
    left = ", ".join(f"{k} {n}" for k, n in kernels.items() if k != "delegate")
    return [
        name,
        bits,
        str(kernels["delegate"]),
        left or "none",
        f"{max(error(a, b) for a, b in pairs):.2e}",
        f"{min(same):.2%}",
        f"{max(error(a, b) for a, b in zip(in_torch, wanted, strict=True)):.2e}",
        f"{len(made.buffer) / 1024:.0f}",
        f"{took:.2f}, {f'{took / in_float:.2f}' if in_float else '–'}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--networks", nargs="+", default=NAMES, choices=NAMES)
    options = parser.parse_args()
    print(f"executorch {version('executorch')}, torch {torch.__version__}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            for bits in options.bits:
                print(f"| {' | '.join(row(name, bits, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()

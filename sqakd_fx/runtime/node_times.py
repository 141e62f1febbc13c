"""Which nodes of a model take most of the runtime's time, by its own profile."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import onnxruntime as ort
from torch import Tensor

from sqakd_fx.runtime.session import CPU, feeds_of, session_options

_RUNS = 5


@dataclass(frozen=True)
class NodeTime:
    """A node of the runtime's optimized graph, the operator that it runs, and its share of the time of a call."""

    node: str
    operator: str
    share: float


def longest_nodes(
    model: Path, inputs: Sequence[Tensor], *, most: int = 3, exact_products: bool = False
) -> list[NodeTime]:
    """The nodes of a model that take longest on one thread of the CPU, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(True, 1, exact_products)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "times")
        running = ort.InferenceSession(str(model), options, providers=[CPU])
        for _ in range(_RUNS):
            running.run(None, feeds_of(running, inputs))
        events = json.loads(Path(running.end_profiling()).read_text(encoding="utf-8"))
    seen: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        name, operator = str(event["name"]), event.get("args", {}).get("op_name")
        if operator is not None and name.endswith("_kernel_time"):
            seen[name.removesuffix("_kernel_time"), str(operator)].append(int(event["dur"]))
    # The median: what another process takes in one run is no time of the node.
    times = Counter({node: median(found) * len(found) for node, found in seen.items()})
    whole = max(times.total(), 1)
    return [NodeTime(*key, time / whole) for key, time in times.most_common(most)]

"""What a pass is, and how a sequence of them is run and logged.

A pass receives a valid graph, leaves a valid graph and says whether it changed it: only then is the
graph checked and recompiled here.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sqakd_fx.errors import PassError, SqakdError, short
from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.ir.outputs import largest_difference, tensors_of

_LARGEST_DIFFERENCE = 1e-3
_OF_ROUNDING = 10.0
"""What a pass may change, in multiples of what rounding to float32 changes."""
_WAY_OUT = "try --set frontend=export, and report the model"


@dataclass(frozen=True)
class Note:
    """A node that a pass left alone although a user might expect otherwise, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    graph_module: fx.GraphModule
    changed: bool
    notes: tuple[Note, ...] = ()

    def require_finite(self) -> None:
        """Raise PassError where a parameter holds NaN or infinity."""
        for name, value in self.graph_module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise PassError(f"{name} is not finite")


class Pass(ABC):
    """A rewrite of a graph; a subclass is a frozen dataclass, and its fields are its options.

    The first line of a subclass's docstring says in one sentence what the pass does.
    """

    name: ClassVar[str]

    def requires(self, graph_module: fx.GraphModule) -> None:  # noqa: B027  (every graph will do)
        """Raise PassError where an earlier pass should have prepared the graph."""

    @abstractmethod
    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place, or give a new one."""

    def ensures(self, result: PassResult) -> None:  # noqa: B027  (a valid graph is all that is promised)
        """Raise PassError where the result lacks what the pass promises."""

    @classmethod
    def sentence(cls) -> str:
        """What the pass does: the first line of its docstring."""
        return (cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of its fields."""
        return tuple(one.name for one in fields(cls))  # type: ignore[arg-type]


GraphObserver = Callable[[Pass, fx.GraphModule], None]
"""What looks at a graph behind a pass."""


@dataclass(frozen=True)
class LogEntry:
    """What one pass did, in seconds of the processor.

    `difference` is the largest change of any output on the probe batch.
    """

    name: str
    added: int
    removed: int
    seconds: float
    changed: bool
    difference: float | None
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Compiled:
    graph_module: fx.GraphModule
    log: tuple[LogEntry, ...] = field(default=())


def run_passes(
    graph_module: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    probe: Callable[[Any], Any] | None = None,
    after: GraphObserver | None = None,
) -> Compiled:
    """Run passes in order on `graph_module`, in place.

    `probe` runs a graph, or what is called like it, on a fixed batch, so that the log can say how much each pass
    changed the output. A model that amplifies rounding may change by as much as float64 changes it, which a note says.
    `after` is called behind every pass; the graph that it gets is rewritten further.

    Raises:
        PassError: a pass refused its input, failed, broke its promise, or changed what the probe
            gives; the message names the pass.
    """
    log: list[LogEntry] = []
    outputs = None if probe is None else tensors_of(probe(graph_module))
    for one in passes:
        old = set(graph_module.graph.nodes)
        started = time.process_time()
        result = _run(one, graph_module)
        seconds = time.process_time() - started
        graph_module = result.graph_module
        difference = None
        if probe is not None and outputs is not None:
            was = outputs
            with _told(f"the model does not run after pass {one.name}"):
                outputs = tensors_of(probe(graph_module)) if result.changed else was
            difference = largest_difference(was, outputs)
            if not difference <= _LARGEST_DIFFERENCE:
                rounding = _rounding(graph_module, outputs, probe)
                note = _explained_by_rounding(one, difference, rounding, graph_module)
                result = replace(result, notes=(*result.notes, note))
        new = set(graph_module.graph.nodes)
        added, removed = len(new - old), len(old - new)
        log.append(
            LogEntry(one.name, added, removed, seconds, result.changed, difference, result.notes)
        )
        if after is not None:
            after(one, graph_module)
    return Compiled(graph_module, tuple(log))


def _run(one: Pass, graph_module: fx.GraphModule) -> PassResult:
    _blame(one, one.requires, graph_module)
    with _told(f"pass {one.name} cannot rewrite the model"):
        result = one(graph_module)
        if result.changed:
            result.graph_module.graph.lint()
            result.graph_module.recompile()
    _blame(one, one.ensures, result)
    return result


def _explained_by_rounding(
    one: Pass, difference: float, rounding: float, graph_module: fx.GraphModule
) -> Note:
    """What a model amplifies rounding by, where that is why a pass changes what it computes.

    Raises:
        PassError: the change is larger than that.
    """
    if difference < math.inf and difference <= _OF_ROUNDING * rounding:
        said = f"float32 and float64 give outputs that differ by {rounding:.1g}: small changes grow in this model"
        return Note(graph_module.graph.output_node().name, said)
    raise PassError(
        f"pass {one.name} changes what the model computes by {difference:.1g}: {_WAY_OUT}"
    )


def _rounding(
    graph_module: fx.GraphModule, outputs: Sequence[Tensor], probe: Callable[[Any], Any]
) -> float:
    """How far its outputs are from those in float64; 0 where the graph does not run there."""
    try:
        exact = deep_copy(graph_module).double()

        def run(*inputs: Any) -> Any:
            return exact(*(x.double() if x.is_floating_point() else x for x in inputs))

        return largest_difference(outputs, tensors_of(probe(run)))
    except Exception:
        return 0.0


def dump_into(folder: Path) -> GraphObserver:
    """Writes the printed graph behind every pass into a folder, numbered in their order."""
    position = itertools.count()

    def dump(one: Pass, graph_module: fx.GraphModule) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = graph_module.print_readable(print_output=False)
        (folder / f"{next(position):02d}-{one.name}.txt").write_text(text, encoding="utf-8")

    return dump


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A bug of a pass as a sentence; errors that are sentences already go through."""
    try:
        yield
    except SqakdError:
        raise
    except Exception as error:
        raise PassError(f"{what} ({short(error)}): {_WAY_OUT}") from error


def _blame(one: Pass, check: Callable[[Any], None], subject: Any) -> None:
    try:
        check(subject)
    except PassError as error:
        raise PassError(f"pass {one.name}: {error}", node=error.node) from error

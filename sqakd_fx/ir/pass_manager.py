"""What a pass is, and how a sequence of them is run and logged.

A pass receives a valid graph, leaves a valid graph and says whether it changed it: only then is the
graph checked and recompiled here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from sqakd_fx.errors import PassError, SqakdError, short
from sqakd_fx.ir.outputs import largest_difference, tensors_of

_LARGEST_DIFFERENCE = 1e-3
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
        """The names of its fields, as annotated by their types."""
        return tuple(f"{one.name}: {one.type}" for one in fields(cls))  # type: ignore[arg-type]


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
    probe: Callable[[fx.GraphModule], Any] | None = None,
    dump: Path | None = None,
) -> Compiled:
    """Run passes in order on `graph_module`, in place.

    `probe` runs a graph on a fixed batch, so that the log can say how much each pass changed the
    output. `dump` is a folder that receives the printed graph after every pass.

    Raises:
        PassError: a pass refused its input, failed, broke its promise, or changed what the probe
            gives; the message names the pass.
    """
    log: list[LogEntry] = []
    before = None if probe is None else tensors_of(probe(graph_module))
    for position, one in enumerate(passes):
        old = set(graph_module.graph.nodes)
        started = time.process_time()
        _blame(one, one.requires, graph_module)
        with _told(f"pass {one.name} cannot rewrite the model"):
            result = one(graph_module)
            if result.changed:
                result.graph_module.graph.lint()
                result.graph_module.recompile()
        _blame(one, one.ensures, result)
        seconds = time.process_time() - started
        graph_module = result.graph_module
        new = set(graph_module.graph.nodes)
        difference = None
        if probe is not None and before is not None:
            with _told(f"the model does not run after pass {one.name}"):
                after = tensors_of(probe(graph_module)) if result.changed else before
            difference = largest_difference(before, after)
            if not difference <= _LARGEST_DIFFERENCE:
                raise PassError(
                    f"pass {one.name} changes what the model computes by {difference:.1g}: {_WAY_OUT}"
                )
            before = after
        log.append(
            LogEntry(
                one.name,
                len(new - old),
                len(old - new),
                seconds,
                result.changed,
                difference,
                result.notes,
            )
        )
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            text = graph_module.print_readable(print_output=False)
            (dump / f"{position:02d}-{one.name}.txt").write_text(text, encoding="utf-8")
    return Compiled(graph_module, tuple(log))


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

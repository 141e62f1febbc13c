"""sqakd-fx: label-free quantization-aware distillation of PyTorch models to integer ONNX."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqakd_fx.errors import SqakdError
    from sqakd_fx.frontend.trace import trace
    from sqakd_fx.pipeline import quantize
    from sqakd_fx.program import Program, build_program, lower
    from sqakd_fx.recipe.keys import Recipe
    from sqakd_fx.recipe.resolution import resolve_recipe
    from sqakd_fx.results.export import export
    from sqakd_fx.results.result import Result
    from sqakd_fx.source.synthetic import synthetic_samples
    from sqakd_fx.stages import calibrate, distil, relieve, validate

_HOMES = {
    "Program": "program",
    "Recipe": "recipe.keys",
    "Result": "results.result",
    "SqakdError": "errors",
    "build_program": "program",
    "calibrate": "stages",
    "distil": "stages",
    "export": "results.export",
    "lower": "program",
    "quantize": "pipeline",
    "relieve": "stages",
    "resolve_recipe": "recipe.resolution",
    "synthetic_samples": "source.synthetic",
    "trace": "frontend.trace",
    "validate": "stages",
}

__all__ = [
    "Program",
    "Recipe",
    "Result",
    "SqakdError",
    "build_program",
    "calibrate",
    "distil",
    "export",
    "lower",
    "quantize",
    "relieve",
    "resolve_recipe",
    "synthetic_samples",
    "trace",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sqakd_fx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names alone; sub-packages are reached by their paths."""
    return list(__all__)

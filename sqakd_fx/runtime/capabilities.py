"""Which forms an ONNX Runtime runs on integer kernels, runs in float, or refuses.

The installed runtime is asked: each form is loaded as a model of its own, and the graph that the runtime
makes of it is read. `python -m sqakd_fx.runtime.capabilities` prints the answers of every provider as JSON.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from sqakd_fx.runtime.forms import FORMS, PLAIN, Form, model_of

CPU = "CPUExecutionProvider"
_WARNING, _FATAL = 2, 4
_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity")


class Support(Enum):
    """What a provider does with a form; the value completes a sentence."""

    INTEGER = "runs on integer kernels"
    FLOAT = "runs in float"
    REFUSED = "is refused at load"
    FALLBACK = "falls back to the CPU"
    ABSENT = "is not tried: the provider does not start"


@functools.cache
def support(form: Form, provider: str = CPU) -> Support:
    """What the installed ONNX Runtime does with a form on a provider."""
    if not starts(provider):
        return Support.ABSENT
    with tempfile.TemporaryDirectory() as folder:
        made, optimized = Path(folder) / "form.onnx", Path(folder) / "optimized.onnx"
        ir.save(model_of(form), made)
        try:
            _session(made, provider, optimized=optimized)
        except Exception:
            return Support.REFUSED
        if provider != CPU:
            try:
                _session(made, provider, {_NO_FALLBACK: "1"})
            except Exception:
                return Support.FALLBACK
        graph = ir.load(optimized).graph
    return Support.FLOAT if any(map(_reads_float, graph)) else Support.INTEGER


def table(provider: str = CPU) -> dict[str, Support]:
    """What the installed ONNX Runtime does with every form, by the form's name."""
    return {form.name: support(form, provider) for form in FORMS}


def _reads_float(node: ir.Node) -> bool:
    """True for an operator behind a DequantizeLinear, which a fused form no longer has."""
    makers = [value.producer() for value in node.inputs if value is not None]
    dequantized = any(m is not None and m.op_type == "DequantizeLinear" for m in makers)
    return dequantized and node.op_type not in _PLUMBING


@functools.cache
def starts(provider: str) -> bool:
    """True where a session really gets the provider; the runtime would take the CPU without a word."""
    ort.set_default_logger_severity(_FATAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "form.onnx"
            ir.save(model_of(PLAIN), made)
            return provider in _session(made, provider).get_providers()
    except Exception:
        return False
    finally:
        ort.set_default_logger_severity(_WARNING)


def _session(
    model: Path,
    provider: str,
    settings: Mapping[str, str] | None = None,
    optimized: Path | None = None,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(model), options, providers=[provider], enable_fallback=0)


def main() -> None:
    """Print {provider: {form: answer}} of the installed runtime."""
    answers = {
        provider: {name: found.name for name, found in table(provider).items()}
        for provider in ort.get_available_providers()
    }
    print(json.dumps({"version": ort.__version__, "providers": answers}))


if __name__ == "__main__":
    main()

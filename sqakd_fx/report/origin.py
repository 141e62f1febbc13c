"""Where a result comes from and how it is used: machine, versions, data, command, recipe, deployment."""

from __future__ import annotations

from sqakd_fx.report.held import Held
from sqakd_fx.report.markup import code, folded, pairs
from sqakd_fx.results.figures import date_words


def facts(held: Held) -> str:
    """Labels and texts."""
    report = held.report
    data = report.data
    training = evaluation = None
    if data is not None:
        training = f"{data.training}: {data.batches} batches of {data.batch_size} an epoch"
        evaluation = data.evaluation or "no labelled data"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    return pairs(
        [
            ("date", date_words(report.date)),
            ("machine", report.processor),
            ("system", report.system),
            ("model", report.source),
            ("training data", training),
            ("evaluation data", evaluation),
            ("validated on", f"{report.validation.samples} samples"),
            ("recipe", f"{report.recipe} ({report.bits}, {report.profile}, for {report.target})"),
            ("training steps", report.steps),
            ("seed", report.seed),
            ("time of stages", seconds),
            ("sqakd-fx", report.version),
            ("PyTorch", report.torch),
            ("ONNX Runtime", report.onnxruntime),
        ]
    )


def command(held: Held) -> str:
    """The command line of the run, where there was one, and the whole recipe."""
    asked = code(held.report.command) if held.report.command else ""
    return asked + folded("recipe.toml", code(held.recipe) if held.recipe else "")


_DEPLOY = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
inputs = {one.name: np.load(f"{one.name}.npy") for one in session.get_inputs()}
for output, value in zip(session.get_outputs(), session.run(None, inputs)):
    print(output.name, value.shape)
"""


def deployment() -> str:
    """Lines that run the file."""
    return code(_DEPLOY)

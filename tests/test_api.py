"""The public names: what the documentation says they are, whatever was imported before them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import sqakd_fx

CLASSES = {"Program", "Recipe", "Result", "SqakdError"}
FIRST_PARAMETERS = {
    "build_program": ["model", "example", "recipe"],
    "calibrate": ["program", "data"],
    "distil": ["program", "data"],
    "export": ["program", "lowered", "path"],
    "lower": ["student"],
    "quantize": ["model", "data"],
    "relieve": ["program", "data"],
    "resolve_recipe": ["recipe"],
    "synthetic_samples": ["model", "example_inputs", "wanted"],
    "trace": ["model", "example"],
    "validate": ["program", "lowered", "path", "data"],
}

IMPORTED_IN_FRESH_PROCESSES = """
import importlib, inspect, json, os, sys
# What the package itself imports, once for all the processes below.
import networkx, onnx, onnx_ir, onnxruntime, onnxscript, PIL, pydantic, rich.progress, safetensors.torch, torch
import torch._dynamo, torch._inductor, torch.export, torch.utils.checkpoint, torch.utils.data, typer

public, modules = json.load(sys.stdin)
assert not any(name.startswith("sqakd_fx") for name in sys.modules)
orders = [public[i:] + public[:i] for i in range(len(public))]
orders += [public[::-1]] + [[module, *public] for module in modules]
for order in orders:
    child = os.fork()
    if not child:
        kinds = {}
        for name in order:
            if name in modules:
                importlib.import_module(name)
            else:
                exec(f"from sqakd_fx import {name}")
        import sqakd_fx
        for name in public:
            found = getattr(sqakd_fx, name)
            kinds[name] = "class" if inspect.isclass(found) else type(found).__name__
            assert found is locals().get(name, found)
        print(json.dumps(kinds), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""

MODULES = [
    "sqakd_fx.cli.main",
    "sqakd_fx.exporters.profiles",
    "sqakd_fx.frontend.trace",
    "sqakd_fx.pipeline",
    "sqakd_fx.quant.calibration",
    "sqakd_fx.stages",
    "sqakd_fx.training.loop",
    "sqakd_fx.validation.validate",
]


def test_the_public_names_are_the_documented_ones() -> None:
    assert sorted(sqakd_fx.__all__) == sorted(CLASSES | FIRST_PARAMETERS.keys())
    assert sorted(dir(sqakd_fx)) == sorted(sqakd_fx.__all__)
    for name, wanted in FIRST_PARAMETERS.items():
        assert list(inspect.signature(getattr(sqakd_fx, name)).parameters)[: len(wanted)] == wanted


def test_every_public_name_is_a_function_or_a_class_after_every_order_of_imports() -> None:
    names = list(sqakd_fx.__all__)
    told = subprocess.run(
        [sys.executable, "-c", IMPORTED_IN_FRESH_PROCESSES],
        input=json.dumps([names, MODULES]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(found) == len(names) + 1 + len(MODULES)
    wanted = {name: "class" if name in CLASSES else "function" for name in names}
    assert all(kinds == wanted for kinds in found)


def test_what_is_not_public_is_no_attribute_of_a_fresh_package() -> None:
    code = "import sqakd_fx\ntry:\n    sqakd_fx.nothing\nexcept AttributeError as error:\n    print(error)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no attribute 'nothing'" in told.stdout

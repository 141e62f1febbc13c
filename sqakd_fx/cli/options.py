"""The options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SourceArgument = Annotated[str, typer.Argument(help="model.py, or package.module:callable")]
Weights = Annotated[
    Path | None,
    typer.Option(help="safetensors, or a pickle of tensors only; FILE:KEY where it holds several"),
]
Data = Annotated[Path | None, typer.Option(help="folder of images, .npy or .npz")]
Shape = Annotated[str | None, typer.Option("--input-shape", help="for example 1,3,224,224")]
SourceOption = Annotated[
    str | None,
    typer.Option("--source", help="model.py of the result: it runs, as a result folder never does"),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="preset or file.toml")]
BitsOption = Annotated[str | None, typer.Option("--bits", help="for example w4a4")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe")]
Target = Annotated[
    str | None,
    typer.Option(
        help="where it will run: onnxruntime, tensorrt, openvino; `capabilities` has them"
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]

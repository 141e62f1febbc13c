"""The options that several commands have, in the groups that `--help` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sqakd_fx.cli.completion import bits_like, presets_like, settings_like
from sqakd_fx.targets import ExportTargetName, TargetName

INPUT, BITS, TRAINING, OUTPUT = "Model and data", "Bits and recipe", "Training", "Output"

ProfileName = Literal[
    "container",
    "packed",
    "typed",
    "tensorrt",
    "qonnx",
    "encodings",
    "float",
    "pt2",
    "pt2e",
    "litert",
]
StageName = Literal["traced", "folded", "quantized", "lowered"]
FormatName = Literal["table", "tree", "code", "dot", "svg", "json"]
RuntimeName = Literal["onnxruntime", "openvino"]
DeviceName = Literal["auto", "cpu", "cuda"]

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="model.py with a function model(), or package.module:callable"
    ),
]
ResultArgument = Annotated[
    Path, typer.Argument(metavar="RESULT", help="A result folder of `sqakd-fx quantize`.")
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Trained weights: safetensors, or a pickle of tensors only. FILE:KEY where a file holds several.",
        rich_help_panel=INPUT,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Unlabelled inputs: a folder of images or WAV files, .npy, .npz, or sentences as .txt, .csv or .parquet.",
        rich_help_panel=INPUT,
    ),
]
WithoutData = Annotated[
    bool,
    typer.Option(
        "--data-free",
        help="Make inputs of the statistics in the model's BatchNorm layers, where there are no real ones.",
        rich_help_panel=INPUT,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FOLDER",
        help="What makes inputs of the sentences of --data: a tokenizer that transformers loads.",
        rich_help_panel=INPUT,
    ),
]
TransformName = Annotated[
    str | None,
    typer.Option(
        "--transform",
        metavar="NAME|FILE",
        help="What images of --data go through: imagenet, clip, inception, none, or a preprocessor_config.json.",
        rich_help_panel=INPUT,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS",
        help="Mean of each channel, of pixels between 0 and 1: 0.485,0.456,0.406.",
        rich_help_panel=INPUT,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS",
        help="Standard deviation of each channel: 0.229,0.224,0.225.",
        rich_help_panel=INPUT,
    ),
]
Resize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Short side of an image before the crop; the aspect ratio is kept.",
        rich_help_panel=INPUT,
    ),
]
Crop = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Side of the centre crop; the model's input size where none is given.",
        rich_help_panel=INPUT,
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="SIZES",
        help="Shape of the one input, batch first: 1,3,224,224.",
        rich_help_panel=INPUT,
    ),
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="MODEL",
        help="The model of the result. Its Python code runs, as a result folder's never does.",
        rich_help_panel=INPUT,
    ),
]
Goal = Annotated[
    Literal["speed", "size", "accuracy"] | None,
    typer.Option(
        "--for",
        metavar="GOAL",
        help="What matters most: speed (W8A8, the default), size (W4A8, packed) or accuracy (W8A8, more in float).",
        rich_help_panel=BITS,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A preset of `sqakd-fx recipes`, or a TOML file.",
        autocompletion=presets_like,
        rich_help_panel=BITS,
    ),
]
BitsOption = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="BITS",
        help="Bits of weights and activations, 1 to 8: w8a8, w4a8, or int8 for w8a8.",
        autocompletion=bits_like,
        rich_help_panel=BITS,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the recipe; may be given several times. `sqakd-fx recipes --keys` has them all.",
        autocompletion=settings_like,
        rich_help_panel=BITS,
    ),
]
Target = Annotated[
    TargetName | None,
    typer.Option(
        metavar="RUNTIME",
        help="Where the file will run: onnxruntime, tensorrt or openvino. It decides which grids are trained.",
        rich_help_panel=BITS,
    ),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        metavar="[INPUT:]NAME=AXIS,...",
        help="Axes whose sizes are free in the file, as the batch is: height=2,width=3, or ids:length=1 of one input. "
        "May be given several times.",
        rich_help_panel=BITS,
    ),
]
ExportTarget = Annotated[
    ExportTargetName | None,
    typer.Option(
        metavar="RUNTIME",
        help="Where the file will run: onnxruntime, tensorrt, openvino, executorch, litert, qnn or qonnx (FINN). "
        "The recipe's own where none is given.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print JSON for programs in place of tables.", rich_help_panel=OUTPUT
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show the traceback behind an error's sentence.", rich_help_panel=OUTPUT
    ),
]

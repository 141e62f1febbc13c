"""Everything that a run can be told, as one validated value.

`sqakd_fx.recipe.resolution` builds one from a preset, a file and settings.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from sqakd_fx.targets import TargetName

KNOWN_FAMILIES = ("minmax", "percentile", "dorefa", "pact", "lsq", "lsq+", "ewgs", "sawb", "qil")


def _known_family(name: str) -> str:
    """Also what a user registered, for which `sqakd_fx.quant.families` (and torch) has been imported."""
    families = sys.modules.get("sqakd_fx.quant.families")
    known = KNOWN_FAMILIES if families is None else tuple(families.FAMILIES)
    if name not in known:
        raise PydanticCustomError("family", "choose one of {known}", {"known": ", ".join(known)})
    return name


FamilyName = Annotated[str, AfterValidator(_known_family)]


def _axis_name(name: str) -> str:
    if not name.isidentifier() or name == BATCH:
        raise PydanticCustomError(
            "axis", "an axis is called by a word such as height, and not {batch}", {"batch": BATCH}
        )
    return name


BATCH = "batch"
"""What the batch axis is called, of every input and output."""
AxisName = Annotated[str, AfterValidator(_axis_name)]
WeightRange = Literal["paired", "reduced", "full"]
LossKind = Literal["auto", "kl", "probabilities", "bce", "kl+mse", "mse", "cosine", "none"]
T = TypeVar("T")
LARGEST_COUNT = _MANY = 2**31 - 1
"""The largest count: more steps, samples or batches than any run has."""


class Override(BaseModel):
    """Settings for the layers whose module path, node name or operation matches a glob."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(description="glob over module paths, node names and operation names")
    exact: bool = Field(
        False, description="match is the whole name of one module or node: no glob, no operation"
    )
    weight_bits: int | None = Field(None, ge=1, le=8, description="bits of the layers' weights")
    activation_bits: int | None = Field(
        None, ge=1, le=8, description="bits of what the layers read"
    )
    weight_family: FamilyName | None = Field(
        None, description="method that quantizes the layers' weights"
    )
    activation_family: FamilyName | None = Field(
        None, description="method that quantizes what the layers read"
    )
    granularity: Literal["channel", "tensor"] | None = Field(
        None, description="a scale for each output channel, or one for the weight"
    )
    weight_range: WeightRange | None = Field(
        None, description="codes of the layers' weights, as the key of the same name says"
    )
    float: bool | Literal["activations"] | None = Field(
        None,
        description='leave these layers in float; with "activations" their weights stay stored in codes; '
        "a sum, product, average or BatchNorm is meant by the name of its node, a weight of a recurrent layer by its "
        "own",
    )
    why: str | None = Field(None, description="shown beside what the override does")


class Preprocess(BaseModel):
    """What the file does to images of bytes: (x / scale - mean) / std, each of a channel."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scale: float = Field(255.0, gt=0, description="what bytes are divided by")
    mean: tuple[float, ...] = Field((0.0,), min_length=1, description="taken off each channel")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="what each channel is divided by"
    )
    layout: Literal["nchw", "nhwc"] = Field(
        "nchw", description="where the images have their channels"
    )


class Recipe(BaseModel):
    """A validated recipe; field names are the keys in TOML and of `--set`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field("custom", description="what reports and the result folder call the recipe")

    # quantizers
    weight_bits: int = Field(4, ge=1, le=8, description="bits of the weights of most layers")
    activation_bits: int = Field(4, ge=1, le=8, description="bits of what most layers read")
    weight_family: FamilyName = Field(
        "lsq", description="method that quantizes weights and trains their ranges"
    )
    activation_family: FamilyName = Field(
        "lsq", description="method that quantizes activations and trains their ranges"
    )
    granularity: Literal["channel", "tensor"] = Field(
        "channel",
        description="a scale for each output channel of a weight, or one for the whole weight",
    )
    first_last: Literal["8bit", "float", "same"] = Field(
        "8bit", description="bits of the first and the last layer"
    )
    projections: Literal["8bit", "float", "same"] = Field(
        "8bit",
        description="bits of layers of one pixel that carry a residual stream past other layers",
    )
    depthwise: Literal["8bit", "float", "same"] = Field(
        "8bit",
        description="bits of depthwise layers, of whose weights each channel has few; 2 % of MobileNetV2's",
    )
    residual_bits: int = Field(
        8, ge=1, le=8, description="least bits of tensors that are added, multiplied or averaged"
    )
    sensitive: Literal["auto", "off"] = Field(
        "auto",
        description="measure after calibration what each 8-bit activation costs the outputs, and leave the worst "
        "in float",
    )
    tolerance: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="relative error that all 8-bit activations may cost an output: with auto 0.03 of values, "
        "0.06 of class scores, 0.12 of others",
    )
    tolerance_work: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the work (multiply-accumulates, and 48 for each element of a result) that may lose "
        "integer kernels for the tolerance",
    )
    embeddings: Literal["8bit", "float"] = Field(
        "8bit",
        description="tables that rows are looked up in: INT8 codes with a scale for each row, or float",
    )
    recurrent_weights: Literal["8bit", "float"] = Field(
        "8bit",
        description="weights of LSTM, GRU and RNN layers, which compute in float: INT8 codes with a scale for each "
        "row, or float",
    )
    residual_streams: Literal["float", "integer"] = Field(
        "float",
        description="sums that normalizations read and linear layers feed, as in transformers: in float, "
        "or quantized like other sums",
    )
    activation_affine: Literal["none", "channel"] = Field(
        "none",
        description="a learned shift and scale of each channel in front of a quantizer, where "
        "convolutions read a tensor at fewer bits than other layers do",
    )
    zero_in_grid: bool = Field(True, description="weights: a grid with a zero, from 2 bits up")
    weight_range: WeightRange = Field(
        "paired",
        description="8-bit weights that meet 8-bit activations: codes within ±127 of which neighbouring input channels "
        "of one sign add up to at most 128, codes within ±64, or all of INT8 (for VNNI, ARM and GPUs)",
    )
    power_of_two: bool = Field(
        False, description="scales are powers of two, for hardware that shifts"
    )
    initialization: Literal["paper", "minmax", "percentile", "mse", "output"] = Field(
        "mse",
        description='how ranges start; "mse" has the least error of the tensor, "output" of the network\'s outputs',
    )
    delta: float | None = Field(
        None, ge=0, description="μ = δ|gradient| (EWGS), for any family; the family's own if absent"
    )
    delta_refresh: int = Field(
        0,
        ge=0,
        le=_MANY,
        description="epochs between new δ from the Hessian's trace (EWGS); 0 for never",
    )
    mu: float = Field(0.0, ge=0, description="μ of the unified backward, beside δ's")
    mu_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="whether μ grows from 0 to mu over training, and how"
    )
    calibration_batches: int = Field(
        8,
        ge=1,
        le=_MANY,
        description="batches from which ranges start; more, where they have fewer than four samples",
    )
    rounding: Literal["nearest", "compensated"] = Field(
        "nearest",
        description="how weights start: on the nearest codes, or so that later weights of a row make up for the "
        "rounding of earlier ones (GPTQ)",
    )
    bias_correction: bool = Field(
        False, description="take out of each bias what quantized weights add to the mean output"
    )

    # graph
    frontend: Literal["auto", "symbolic", "export"] = Field(
        "auto",
        description="what traces the model: torch.fx (symbolic), torch.export (export), or the first that can",
    )
    float_modules: tuple[str, ...] = Field((), description="submodules that stay whole in float")
    specialize: tuple[str, ...] = Field(
        (), description="submodules whose branches on data the example decides"
    )
    equalize: Literal["off", "weights", "activations"] = Field(
        "off",
        description="give channels like sizes before calibration: of the weights on both sides (cross-layer "
        "equalization), or of activations by what calibration sees (SmoothQuant); the float model stays the same",
    )
    equalize_strength: float = Field(
        0.5, ge=0, le=1, description='α of equalize = "activations": 0 evens weights, 1 activations'
    )
    batch_norm: Literal["absorb", "fold"] = Field(
        "absorb",
        description="train BatchNorm live and absorb it at lowering, or fold it first; what cannot be folded then "
        "keeps the float model's statistics",
    )

    # distillation
    epochs: int = Field(4, ge=0, le=_MANY, description="passes over the training data")
    steps: int | None = Field(
        None, ge=0, le=_MANY, description="training steps, in place of epochs"
    )
    batch_size: int = Field(
        128, ge=1, le=_MANY, description="where the data is not batched already"
    )
    workers: int = Field(
        0,
        ge=0,
        le=1024,
        description="processes that load a Dataset's samples ahead of the training loop",
    )
    temperature: float = Field(
        4.0,
        gt=0,
        le=1e6,
        description="divides class scores in the KL loss; higher values weigh small scores more",
    )
    loss: LossKind | dict[str, LossKind] = Field(
        "auto",
        description='distance of the outputs: one for all, or by name: {logits="kl", "aux*"="none"}; "auto" by what '
        "each output is",
    )
    class_axis: int | dict[str, int] | None = Field(
        None,
        description="axis of the classes, for all outputs or by name; by what each output is where absent",
    )
    parts: dict[str, tuple[Annotated[int, Field(ge=1)], ...]] | None = Field(
        None,
        description="by output the sizes of unlike parts that it joins, as boxes and scores: each counts alike in mse; "
        "by what joins them where absent",
    )
    labels: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of cross-entropy with labels in the loss, to compare with; 1 for labels alone",
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="what updates weights and ranges"
    )
    learning_rate: float = Field(1e-3, gt=0, description="of weights and biases, at its highest")
    quantizer_learning_rate: float = Field(
        1e-3, gt=0, description="of the ranges of quantizers, at its highest"
    )
    quantizer_rate: Literal["absolute", "relative"] = Field(
        "absolute", description="a range's learning rate as it is, or times the range's size"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="of weights alone; part of the gradient but for adamw"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="share of the last step in the next, for SGD"
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="course of the learning rates over the steps"
    )
    warmup: float = Field(
        0.05, ge=0, lt=1, description="share of the steps over which learning rates rise"
    )
    feature_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the distance of inner features (SQuaT); 0 for outputs alone",
    )
    features: Literal["late", "sums"] = Field(
        "late", description="which features: the last one, or those behind all residual sums"
    )
    feature_target: Literal["quantized", "float"] = Field(
        "quantized",
        description="the teacher's features on the student's grid (SQuaT), or as they are",
    )
    feature_fade: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps over which feature_weight falls to 0; 0 where it stays",
    )
    mixing: Literal["none", "cutmix", "mixup"] = Field(
        "none", description="images mixed with one another, as more unlabelled inputs"
    )
    mix_every: int = Field(1, ge=1, le=_MANY, description="mix one batch in so many")
    progressive: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(
        (), description="wider bits to start with, as (8, 4); the recipe's own bits come last"
    )
    progressive_share: float = Field(0.3, gt=0, lt=1, description="share of the steps on them")
    freeze_oscillations: float = Field(
        0.0, ge=0, lt=1, description="weights that swing in more than this share of steps are held"
    )
    freeze_from: float = Field(0.5, ge=0, lt=1, description="share of the steps before that")
    weight_average: float = Field(0.0, ge=0, lt=1, description="decay of the average of weights")
    reestimate_batch_norm: int = Field(
        0,
        ge=0,
        le=_MANY,
        description="batches over which BatchNorm statistics are taken again before export",
    )

    # engine
    seed: int = Field(
        0,
        ge=-_MANY,
        le=2 * _MANY + 1,
        description="of the order of samples, of what is kept back and of all other draws",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where training runs; auto takes a GPU where there is one"
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile for the training step; auto where it pays"
    )
    cuda_graph: bool = Field(
        True, description="record a step on a GPU and replay it, without Python in between"
    )
    deterministic: bool = Field(
        False, description="the same bits in every run on a GPU too (a CPU always does), and slower"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="number format of the training step"
    )
    accumulate: int = Field(
        1, ge=1, le=_MANY, description="parts that a batch is computed in, for less memory"
    )
    checkpoint_activations: bool = Field(
        False, description="compute inner tensors twice in place of keeping them, for less memory"
    )
    cache_teacher: bool = Field(
        False, description="keep the teacher's outputs on disk, for data that is not augmented"
    )
    shard_teacher: bool = Field(
        False,
        description="divide the teacher's weights among the processes of torchrun, for less memory",
    )
    held_out: int = Field(
        256,
        ge=0,
        le=_MANY,
        description="samples (at most 1 in 20) kept from training to measure agreement",
    )
    early_stop: int | None = Field(
        None,
        ge=1,
        le=_MANY,
        description="epochs without a better held-out agreement that end training",
    )
    tf32: bool = Field(True, description="TF32 for float32 products and convolutions on a GPU")
    checkpoint_seconds: float = Field(60.0, gt=0, description="seconds between two checkpoints")
    checkpoint_steps: int | None = Field(
        None, ge=1, le=_MANY, description="steps between two checkpoints, in place of seconds"
    )
    tensorboard: bool = Field(
        False, description="write scalars for TensorBoard beside train.jsonl; needs its package"
    )

    # export
    target: TargetName = Field(
        "onnxruntime", description="where the model will run; decides which grids are trained"
    )
    opset: int = Field(21, ge=21, le=25, description="ONNX operator set of the file")
    dynamic: dict[str, dict[AxisName, Annotated[int, Field(ge=1)]]] = Field(
        {},
        description="axes whose sizes are free in the file, as the batch is, by input: {x = {height = 2, width = 3}}; "
        '"*" is every input',
    )
    profile: Literal["container", "packed", "typed"] = Field(
        "container", description="how weights are stored in model.onnx"
    )

    int4_block: Literal[0, 64, 128] = Field(
        0,
        description="for TensorRT, block of values with one scale in INT4 weights of linear layers; 0 stores INT8",
    )
    preprocess: dict[str, Preprocess] = Field(
        {},
        description="inputs that the file takes as uint8 images, by input: {x = {mean = [0.5], std = [0.5], "
        'layout = "nhwc"}}; the file computes (x / 255 - mean) / std',
    )

    override: tuple[Override, ...] = Field(
        (), description="settings for single layers: tables [[override]] in a recipe file"
    )


def setting_of(value: T | Mapping[str, T], name: str) -> T | None:
    """A recipe's value for one output: the value itself, or of the first glob that fits the name."""
    if not isinstance(value, Mapping):
        return value
    return next((v for pattern, v in value.items() if fnmatchcase(name, pattern)), None)

"""torchvision's detectors: what computes as modules of tensors, and the detector around it.

A detector's own forward takes a list of images of any size, and chooses boxes in Python. `parts` gives its
backbone and heads, which a file can hold. `with_parts` is the detector again, with files in their place:
resizing, anchors and the choice of boxes stay torchvision's. A file takes images of one size: `with_size` pads to it.

    whole = torchvision.models.detection.retinanet_resnet50_fpn(weights="DEFAULT", min_size=480, max_size=640)
    detector = detectors.with_size(whole.eval(), 640, 640)

    def model():
        return detectors.parts(detector)["network"]

    def train_data():
        return detectors.part_inputs(detector, images)["network"]

    quantized = detectors.with_parts(detector, {"network": detectors.onnx_file("model.onnx")})
    quantized([image])                          # boxes, labels and scores
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from sqakd_fx.errors import SourceError

Run = Callable[[Tensor], Any]
"""What computes a part: its outputs, in the part's own structure or as a flat sequence."""

_STAGES = {
    "regions": ("box_head", "box_predictor"),
    "masks": ("mask_head", "mask_predictor"),
    "keypoints": ("keypoint_head", "keypoint_predictor"),
}
"""Of a second stage: head and predictor of each part."""


class Network(nn.Module):
    """Backbone and head of a one-stage detector: scores and boxes of all anchors."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Any:
        return self.head(list(_named(self.backbone(images)).values()))


class Proposals(nn.Module):
    """Backbone and first stage of a two-stage detector: feature maps, scores and boxes of all anchors."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        features = _named(self.backbone(images))
        scores, boxes = self.head(list(features.values()))
        return features, scores, boxes


def is_detector(model: nn.Module) -> bool:
    """Whether a model has the form of torchvision's detectors."""
    children = dict(model.named_children())
    first_stage = children.get("rpn")
    stages = ("transform" in children, "backbone" in children)
    return all(stages) and ("head" in children or hasattr(first_stage, "head"))


def parts(detector: nn.Module) -> dict[str, nn.Module]:
    """What computes in a detector, by name; the modules share the detector's weights.

    One stage (RetinaNet, FCOS, SSD): `network`. Two stages (Faster, Mask and Keypoint R-CNN): `proposals` and
    `regions`, and `masks` or `keypoints` where there are such heads.

    Raises:
        SourceError: the model is no detector of torchvision's form.
    """
    if not is_detector(detector):
        raise SourceError(
            f"{type(detector).__name__} has not the form of torchvision's detectors (transform, backbone, and head or "
            "rpn): write a module of its backbone and heads by hand"
        )
    whole: Any = detector
    if hasattr(whole, "head"):
        return {"network": Network(whole.backbone, whole.head).eval()}
    found: dict[str, nn.Module] = {"proposals": Proposals(whole.backbone, whole.rpn.head).eval()}
    for name, stages in _STAGES.items():
        heads = dict(whole.roi_heads.named_children())
        modules = [heads[stage] for stage in stages if stage in heads]
        if len(modules) == len(stages):
            found[name] = nn.Sequential(*modules).eval()
    return found


def with_size(detector: nn.Module, height: int, width: int) -> nn.Module:
    """The detector with all images padded to one size, as it pads those of a batch; it shares all else.

    What is larger after the detector's own resizing is a SourceError in its call.
    """

    def batch_images(images: Sequence[Tensor], size_divisible: int = 32) -> Tensor:
        batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
        for place, image in zip(batch, images, strict=True):
            high, wide = image.shape[1:]
            if high > height or wide > width:
                raise SourceError(
                    f"an image is {high}×{wide} after the detector's own resizing, and the size asked for is "
                    f"{height}×{width}: lower min_size and max_size of the detector's transform, or ask for more"
                )
            place[:, :high, :wide] = image
        return batch

    transform: Any = _replaced(detector.get_submodule("transform"))
    transform.batch_images = batch_images
    return _replaced(detector, transform=transform).eval()


def part_inputs(detector: nn.Module, images: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """What the detector gives to each of its parts, image by image: data to calibrate and train the parts with.

    `images` are as the detector takes them: channels first, any size, within 0 to 1.
    """
    received: dict[str, list[Tensor]] = {name: [] for name in parts(detector)}
    runs = {name: _kept(part, received[name]) for name, part in parts(detector).items()}
    watched = with_parts(detector, runs)
    with torch.no_grad():
        for image in images:
            watched([image])
    return received


def with_parts(detector: nn.Module, runs: Mapping[str, Run]) -> nn.Module:
    """The detector in evaluation mode with parts computed by `runs`; it shares all else with `detector`.

    Raises:
        SourceError: `runs` names a part that the detector has not.
    """
    there = parts(detector)
    for name in runs:
        if name not in there:
            raise SourceError(f"this detector has no part {name!r}: its parts are {_list(there)}")
    computed = {name: _computed(there[name], run) for name, run in runs.items()}
    whole: Any = detector
    if "network" in computed:
        ends = _two_ends(computed["network"], _shapes_of(whole.backbone))
        return _replaced(detector, backbone=ends[0], head=ends[1]).eval()
    children: dict[str, nn.Module] = {}
    if "proposals" in computed:
        backbone, head = _two_ends(computed["proposals"], None)
        children |= {"backbone": backbone, "rpn": _replaced(whole.rpn, head=head)}
    stages = [(_STAGES[name], run) for name, run in computed.items() if name in _STAGES]
    heads = {head: nn.Identity() for (head, _), _ in stages}
    predictors = {predictor: _Part(run) for (_, predictor), run in stages}
    children["roi_heads"] = _replaced(whole.roi_heads, **heads, **predictors)
    return _replaced(detector, **children).eval()


def onnx_file(path: str | Path, *, provider: str = "CPUExecutionProvider") -> Run:
    """What computes a part by an exported file under ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=[provider])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {name: images.cpu().numpy()})]

    return run


class _Part(nn.Module):
    """A function in the place of a module; what else the detector hands to the module is left out."""

    def __init__(self, function: Run) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any, *_: Any) -> Any:
        return self.function(x)


def _two_ends(run: Run, shapes: Run | None) -> tuple[_Part, _Part]:
    """Stand-ins for a backbone and a head that one run computes: the first runs, the second hands over.

    The anchors need the shapes of feature maps: `shapes` gives those of a run that does not give the maps.
    """
    held: list[Any] = []

    def first(images: Tensor) -> Any:
        outputs = run(images)
        features, end = (outputs[0], outputs[1:]) if shapes is None else (shapes(images), outputs)
        held[:] = [end]
        return features

    return _Part(first), _Part(lambda features: held.pop())


def _computed(part: nn.Module, run: Run) -> Run:
    """`run` with outputs in the structure of the part's own; without samples nothing runs."""
    on_meta = _on_meta(part)

    def outputs(x: Tensor) -> Any:
        made = on_meta(x)
        leaves, structure = tree_flatten(made)
        if len(x) == 0:
            return tree_map_only(Tensor, lambda y: torch.empty(y.shape, device=x.device), made)
        given = tree_leaves(run(x))
        if len(given) != len(leaves):
            raise SourceError(
                f"a part of the detector gives {len(leaves)} tensors, and what runs in its place gives {len(given)}: "
                "give each part the file that was made of it"
            )
        return tree_unflatten([y.to(x.device) for y in given], structure)

    return outputs


def _shapes_of(backbone: nn.Module) -> Run:
    """Feature maps that hold zeros and no memory."""
    on_meta = _on_meta(backbone)

    def maps(x: Tensor) -> Any:
        return tree_map_only(Tensor, lambda y: x.new_zeros(()).expand(y.shape), on_meta(x))

    return maps


def _on_meta(module: nn.Module) -> Run:
    """The module's outputs as tensors without values, for each shape of input once."""
    known: dict[torch.Size, Any] = {}

    def call(x: Tensor) -> Any:
        if x.shape not in known:
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            empty = {name: value.detach().to("meta") for name, value in state.items()}
            with torch.no_grad():
                known[x.shape] = functional_call(module, empty, (x.detach().to("meta"),))
        return known[x.shape]

    return call


def _kept(part: nn.Module, received: list[Tensor]) -> Run:
    """The part itself, with what it is given put into `received`."""

    def run(x: Tensor) -> Any:
        received.append(x.detach().clone())
        return part(x)

    return run


def _replaced(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A copy of the module that shares its weights, with other children."""
    fresh = copy.copy(module)
    fresh._modules = {**module._modules, **children}
    return fresh


def _named(features: Any) -> dict[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else features


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)

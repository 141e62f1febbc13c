"""Real inputs that packages ship: photographs, faces, speech, music, text.

Everything here is read from a PyPI package, a Debian package or a clone of a public repository; nothing is downloaded.
What is not installed raises `MissingInputs`, which names it.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import random
import wave
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

PHOTOGRAPHS = "photographs of scikit-image, scikit-learn (PyPI), mate-backgrounds and ukui-wallpapers (Debian)"
LABELLED = (
    "1,000 photographs, one of each class of ImageNet: 250 for the tools, 750 with labels for the score; "
    "a clone of github.com/EliSchwartz/imagenet-sample-images in the folder SQAKD_FX_PHOTOGRAPHS"
)
SPEECH = "voice prompts of asterisk-core-sounds-{en,es,fr,it,ru}-wav (Debian), 8 kHz"
MUSIC = "music of asterisk-moh-opsound-wav (Debian), 8 kHz"
DOCSTRINGS = "docstrings of Python, NumPy, SciPy and PyTorch"

_SKIMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_BACKGROUNDS = Path("/usr/share/backgrounds")
_VOICES = Path("/usr/share/asterisk/sounds")
_MUSIC = Path("/usr/share/asterisk/moh")


class MissingInputs(Exception):
    """A package that holds inputs is not installed."""


def package_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, without importing it.

    Raises:
        MissingInputs: it is not there.
    """
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise MissingInputs(f"{'/'.join((package, *parts))} is not installed")


@cache
def photographs() -> tuple[Image.Image, ...]:
    """About thirty photographs, in a fixed order."""
    paths = [package_file("skimage", "data", name) for name in _SKIMAGE]
    paths += [
        package_file("sklearn", "datasets", "images", name) for name in ("china.jpg", "flower.jpg")
    ]
    nature = sorted((_BACKGROUNDS / "mate" / "nature").glob("*.jpg"))
    ukui = [
        _BACKGROUNDS / f"{name}.png"
        for name in ("calla", "city", "desert", "goldfish", "rollpaper")
    ]
    if len(nature) < 10 or not all(path.exists() for path in ukui):
        raise MissingInputs("apt install mate-backgrounds ukui-wallpapers: photographs")
    return tuple(_reduced(Image.open(path).convert("RGB")) for path in paths + nature + ukui)


def _reduced(image: Image.Image) -> Image.Image:
    image.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
    return image


def crops(size: int, count: int, held_out: bool) -> list[Image.Image]:
    """Square crops of random place and scale; held-out ones are of other photographs."""
    draw = random.Random(7 if held_out else 3)
    chosen = photographs()[1::2] if held_out else photographs()[::2]
    made = []
    for number in range(count):
        image = chosen[number % len(chosen)]
        side = int(min(image.size) * draw.uniform(0.4, 1.0))
        left = draw.randint(0, image.width - side)
        top = draw.randint(0, image.height - side)
        crop = image.crop((left, top, left + side, top + side))
        crop = crop.resize((size, size), Image.Resampling.BILINEAR)
        made.append(
            crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else crop
        )
    return made


def labelled_photographs(
    size: int, enlarged: int, filter: Image.Resampling, held_out: bool
) -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Central crops of `size` after the shorter side became `enlarged`, and their classes in ImageNet's order.

    Every fourth is for training, the others are held out.

    Raises:
        MissingInputs: `SQAKD_FX_PHOTOGRAPHS` names no folder of 1,000 photographs.
    """
    paths = sorted(Path(os.environ.get("SQAKD_FX_PHOTOGRAPHS", "nowhere")).glob("n*_*.JPEG"))
    if len(paths) != 1000:
        raise MissingInputs(f"SQAKD_FX_PHOTOGRAPHS does not name them: {LABELLED}")
    classes = [n for n in range(1000) if (n % 4 != 0) == held_out]
    images = [
        _central(Image.open(paths[n]).convert("RGB"), size, enlarged, filter) for n in classes
    ]
    return images, np.asarray(classes)


def _central(image: Image.Image, size: int, enlarged: int, filter: Image.Resampling) -> Image.Image:
    scale = enlarged / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), filter)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pixels(images: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, 3, H, W): values of 0 to 255, less `mean`, over `std`."""
    stacked = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    scaled = (stacked - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous()


def imagenet_pixels(images: Sequence[Image.Image]) -> Tensor:
    """As torchvision's ImageNet networks take them."""
    return pixels(images, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def faces() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """200 grey 25x25 images of scikit-image's `lfw_subset`, values of 0 to 1: 100 faces (1), 100 others (0)."""
    images = np.load(package_file("skimage", "data", "lfw_subset.npy")).astype(np.float32)
    return images, np.repeat([1, 0], 100).astype(np.int64)


def top1(outputs: Any, targets: Any) -> float:
    """Scores (N, classes) whose largest is the target's, in percent."""
    return float((np.asarray(outputs).argmax(1) == np.asarray(targets)).mean() * 100)


def batches(whole: Tensor, size: int) -> list[Tensor]:
    return list(whole.split(size))


def read_wave(path: Path, rate: int) -> NDArray[np.float32]:
    """A mono recording of 16 bits, resampled, values of -1 to 1."""
    from scipy.signal import resample_poly

    with wave.open(str(path)) as file:
        given = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    whole = samples.astype(np.float32) / 32768
    if given == rate:
        return whole
    common = np.gcd(given, rate)
    return resample_poly(whole, rate // common, given // common).astype(np.float32)


def voices(rate: int, seconds: float, count: int) -> dict[str, list[NDArray[np.float32]]]:
    """`count` recordings of at least `seconds` by each of four speakers of five languages.

    Two folders are of one speaker, Allison.
    """
    found: dict[str, list[NDArray[np.float32]]] = {}
    for folder in sorted(_VOICES.glob("*_*_*_*")):
        speaker = folder.name.rpartition("_")[2]
        long = sorted(
            path
            for path in folder.rglob("*.wav")
            if path.stat().st_size > seconds * 16_000 + 44 and "silence" not in path.parts
        )
        step = max(1, len(long) // count)
        found.setdefault(speaker, []).extend(read_wave(path, rate) for path in long[::step][:count])
    if len(found) < 4:
        raise MissingInputs("apt install asterisk-core-sounds-{en,es,fr,it,ru}-wav: speech")
    return found


def music(rate: int) -> list[NDArray[np.float32]]:
    """Whole pieces."""
    paths = sorted(_MUSIC.glob("*.wav"))
    if not paths:
        raise MissingInputs("apt install asterisk-moh-opsound-wav: music")
    return [read_wave(path, rate) for path in paths]


def windows(
    recordings: Sequence[NDArray[np.float32]], length: int, count: int
) -> NDArray[np.float32]:
    """`count` pieces of `length` samples, spread evenly over the recordings that are long enough."""
    long = [one for one in recordings if len(one) >= length]
    each = -(-count // len(long))
    pieces = [
        one[start : start + length]
        for one in long
        for start in np.linspace(0, len(one) - length, each, dtype=int)
    ]
    return np.stack(pieces[:: max(1, len(pieces) // count)][:count])


@cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(first sentence, the paragraphs behind it) of functions and classes, in a fixed mixed order."""
    import scipy.ndimage
    import scipy.signal
    import scipy.special
    import scipy.stats

    modules = [np, np.linalg, torch, torch.nn, torch.nn.functional]
    modules += [scipy.stats, scipy.signal, scipy.ndimage, scipy.special]
    pairs = dict(pair for module in modules for pair in _docstrings_of(module))
    ordered = sorted(pairs.items())
    random.Random(0).shuffle(ordered)
    return tuple(ordered)


def _docstrings_of(module: object) -> Iterator[tuple[str, str]]:
    for _, value in sorted(vars(module).items()):
        text = inspect.getdoc(value) if callable(value) else None
        paragraphs = [" ".join(part.split()) for part in (text or "").split("\n\n")]
        prose = [part for part in paragraphs if len(part) > 40 and ">>>" not in part]
        if len(prose) > 1:
            yield prose[0][:300], " ".join(prose[1:])[:600]

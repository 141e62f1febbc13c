from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_files import EXAMPLE, LINEAR, NET, refused, write
from PIL import Image
from torch import Tensor

from sqakd_fx.errors import RecipeError, SourceError, StorageError
from sqakd_fx.recipe.resolution import read_toml
from sqakd_fx.source.arrays import read_data
from sqakd_fx.source.source import load_source
from sqakd_fx.storage import read_json, write_text

pytestmark = pytest.mark.usefixtures("clean_imports")


def images(folder: Path) -> Path:
    for index, suffix in enumerate(("png", "JPG", "bmp", "webp", "ppm")):
        path = folder / f"class{index % 2}" / "deep" / f"{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 5), (255, 255, 255)).save(path)
    (folder / "readme.txt").touch()
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_images_take_the_channels_and_size_of_the_input(tmp_path: Path, channels: int) -> None:
    spec = write(tmp_path, NET.replace("Conv2d(1", f"Conv2d({channels}"))
    source = load_source(spec, data=images(tmp_path / "d"), input_shape=(1, channels, 6, 4))
    data: Any = source.train_data
    assert len(data) == 5
    for index in range(5):
        assert data[index].shape == (channels, 6, 4)
        assert data[index].dtype == torch.float32
        assert float(data[index].min()) > 0.99
        assert float(data[index].max()) == 1.0
    assert not source.labels_ignored


def test_an_image_that_does_not_decode_is_named_when_it_is_read(tmp_path: Path) -> None:
    (images(tmp_path / "d") / "aaa.png").write_bytes(b"\x89PNG nonsense")
    spec = write(tmp_path, NET)
    source = load_source(spec, data=tmp_path / "d", input_shape=(1, 1, 6, 6))
    with pytest.raises(SourceError, match=r"aaa\.png"):
        _ = source.labels_ignored


def test_postscript_that_is_called_a_picture_is_given_to_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with contextlib.suppress(OSError), Image.open(path) as picture:
        picture.load()
    assert (tmp_path / "ran").exists(), "Pillow itself runs the program"
    (tmp_path / "ran").unlink()
    with pytest.raises(SourceError, match=r"a\.png does not decode"):
        read_data(tmp_path / "d", (1, 1, 8, 8))[0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name != "posix", reason="pipes with names are of POSIX")
def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    for name in ("a.png", "a.npy", "a.toml", "a.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match="there are no images"):
        read_data(tmp_path, (1, 1, 8, 8))
    with pytest.raises(SourceError, match="neither a folder of images or"):
        read_data(tmp_path / "a.npy", None)
    with pytest.raises(RecipeError, match="is not a file"):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(StorageError, match="is not a file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(StorageError, match="is there and is not a file"):
        write_text(tmp_path / "a.json", "3")


def test_images_need_a_shape_with_channels(tmp_path: Path) -> None:
    linear, net = write(tmp_path, LINEAR + EXAMPLE), write(tmp_path, NET, "net.py")
    data = images(tmp_path / "d")
    (tmp_path / "none").mkdir()
    assert "--input-shape" in str(refused(net, data=data))
    assert "(1, 4)" in str(refused(linear, data=data))
    five = {"input_shape": (1, 5, 6, 6)}
    assert "5" in str(refused(net, data=data, **five))
    assert "no images" in str(refused(net, data=tmp_path / "none", input_shape=(1, 1, 6, 6)))


GREY = np.arange(3 * 6 * 6, dtype=np.uint8).reshape(3, 6, 6)
SCALED = torch.from_numpy(GREY)[:, None] / 255


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (GREY, (1, 1, 6, 6)),
        (GREY, None),
        (GREY[:, None], (1, 1, 6, 6)),
        (GREY[..., None], (1, 1, 6, 6)),
        ((GREY / 255)[:, None], (1, 1, 6, 6)),
    ],
    ids=["grey", "grey without a shape", "NCHW", "NHWC", "float64"],
)
def test_an_array_becomes_float_samples_with_a_channel_axis(
    tmp_path: Path, array: np.ndarray[Any, Any], shape: tuple[int, ...] | None
) -> None:
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", labels=np.zeros(3), images=array)
    for name in ("x.npy", "x.npz"):
        source = load_source(write(tmp_path, NET), data=tmp_path / name, input_shape=shape)
        data: Any = source.train_data
        samples: Tensor = torch.stack([data[i] for i in range(len(data))])
        assert samples.dtype == torch.float32
        torch.testing.assert_close(samples, SCALED)


def test_integer_arrays_stay_integers(tmp_path: Path) -> None:
    text = "from torch import nn\ndef model():\n    return nn.Embedding(9, 2)\n"
    np.savez(tmp_path / "x.npz", tokens=np.ones((3, 7), np.int64))
    source = load_source(write(tmp_path, text), data=tmp_path / "x.npz")
    assert source.example_inputs[0].shape == (2, 7)
    assert source.example_inputs[0].dtype == torch.int64


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.array([None, 1]), "cannot be read"),
        (np.zeros((0, 4)), "is empty"),
        (np.float32(3), "is empty"),
        (np.zeros((3, 5)), "shape (5,), but the model's input has (4,)"),
    ],
)
def test_an_array_that_cannot_be_input_is_refused(tmp_path: Path, array: Any, part: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    np.savez(tmp_path / "x.npz", array, allow_pickle=True)
    spec = write(tmp_path, LINEAR + EXAMPLE)
    assert part in str(refused(spec, data=tmp_path / "x.npy"))
    assert part in str(refused(spec, data=tmp_path / "x.npz"))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_damaged_array_file_is_refused(tmp_path: Path, content: bytes) -> None:
    spec = write(tmp_path, LINEAR + EXAMPLE)
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in str(refused(spec, data=tmp_path / name))


def test_an_archive_made_to_fill_memory_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (300, 1 << 20)}
        )
        for _ in range(300):
            file.write(bytes(1 << 20))
    with pytest.raises(SourceError, match=r"to 300 MiB, more than is taken unasked.*\.npy"):
        read_data(path, None)


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    for name, shape in (("many", (1 << 50, 4)), ("some", (1 << 20, 4))):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": shape}
            )
            file.write(bytes(64))
        with pytest.raises(SourceError, match="the array"):
            read_data(path, None)


def test_an_ordinary_archive_of_few_colours_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((500, 1, 28, 28), np.uint8))
    assert len(read_data(tmp_path / "x.npz", (1, 1, 28, 28))) == 500  # type: ignore[arg-type]


def test_a_picture_too_large_to_be_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    Image.new("L", (300, 300)).save(tmp_path / "d" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SourceError, match=r"huge\.png"):
        _ = read_data(tmp_path / "d", (1, 1, 6, 6))[0]


def test_grey_of_16_bits_keeps_its_range_and_float_pixels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    values = np.linspace(0, 65535, 36).reshape(6, 6)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "d" / "a.png")
    for channels in (1, 3, 4):
        (pixels,) = (read_data(tmp_path / "d", (1, channels, 6, 6))[i] for i in range(1))
        assert pixels.shape == (channels, 6, 6)
        assert np.allclose(pixels[0].numpy(), values / 65535, atol=1e-4)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "d" / "0.tiff")
    with pytest.raises(SourceError, match=r"0\.tiff has float pixels"):
        _ = read_data(tmp_path / "d", (1, 1, 6, 6))[0]

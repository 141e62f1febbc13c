"""Images of a folder, as a model was trained to see them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import NET, refused, write
from PIL import Image
from torch import nn

from sqakd_fx.cli.arguments import DataOptions
from sqakd_fx.errors import RecipeError, SourceError
from sqakd_fx.source.arrays import read_data
from sqakd_fx.source.source import load_source
from sqakd_fx.source.torchvision_models import torchvision_shape
from sqakd_fx.source.transform import NAMED, Transform, named_transform

pytestmark = pytest.mark.usefixtures("clean_imports")


def folder_with(path: Path, pixels: np.ndarray, name: str = "one.png") -> Path:
    path.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path / name)
    return path


def test_the_aspect_ratio_is_kept_and_the_centre_is_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((8, 32, 3), np.uint8)
    pixels[:, 12:20] = 255  # a white square in the middle
    (image,) = (read_data(folder_with(tmp_path / "d", pixels), (1, 3, 8, 8))[i] for i in range(1))
    assert torch.equal(image, torch.ones(3, 8, 8))


def test_the_short_side_is_resized_before_the_crop(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[12:52, 44:84] = 255
    data = read_data(folder_with(tmp_path / "d", pixels), (1, 3, 16, 16), Transform(resize=32))
    assert torch.equal(data[0], torch.ones(3, 16, 16))
    whole = read_data(tmp_path / "d", (1, 3, 16, 16), Transform(resize=16))
    assert float(whole[0].mean()) == pytest.approx((40 / 64) ** 2, abs=0.03)


def test_an_image_is_decoded_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "d"
    for index in range(3):
        folder_with(folder, rng.integers(0, 256, (9, 8, 3), np.uint8), f"{index}.png")
    data = read_data(folder, (1, 3, 4, 4), NAMED["imagenet"])
    first = [data[i] for i in range(3)]
    for file in folder.iterdir():
        file.unlink()
    assert all(torch.equal(data[i], x) for i, x in enumerate(first))


def test_kept_images_do_not_travel_to_other_processes(tmp_path: Path) -> None:
    data = read_data(folder_with(tmp_path / "d", np.zeros((64, 64, 3), np.uint8)), (1, 3, 64, 64))
    before = len(pickle.dumps(data))
    black = data[0]
    assert len(pickle.dumps(data)) == before
    assert torch.equal(pickle.loads(pickle.dumps(data))[0], black)


def test_images_beyond_the_memory_for_them_are_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqakd_fx.source.images._KEPT_BYTES", 4 * 4 * 3)
    folder = folder_with(tmp_path / "d", np.zeros((4, 4, 3), np.uint8), "0.png")
    folder_with(folder, np.full((4, 4, 3), 255, np.uint8), "1.png")
    data = read_data(folder, (1, 3, 4, 4))
    assert [float(data[i].mean()) for i in (0, 1, 1)] == [0, 1, 1]
    (folder / "1.png").unlink()
    assert float(data[0].mean()) == 0
    with pytest.raises(SourceError, match="does not decode"):
        data[1]


def test_mean_and_std_are_taken_off_each_channel(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 3), 255, np.uint8)
    imagenet = NAMED["imagenet"]
    image = read_data(folder_with(tmp_path / "d", pixels), (1, 3, 4, 4), imagenet)[0]
    wanted = [(1 - m) / s for m, s in zip(imagenet.mean or (), imagenet.std or ())]
    assert image[:, 0, 0].tolist() == pytest.approx(wanted, rel=1e-6)


def test_sixteen_bits_go_through_the_same_transform(tmp_path: Path) -> None:
    grey = np.full((4, 12), 65535, np.uint16)
    inception = NAMED["inception"]
    image = read_data(folder_with(tmp_path / "d", grey), (1, 1, 4, 4), inception)[0]
    assert torch.equal(image, torch.ones(1, 4, 4))


def test_colours_of_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "d" / "grey.tiff")
    image = read_data(tmp_path / "d", (1, 3, 4, 4))[0]
    assert image.unique().tolist() == pytest.approx([32768 / 65535])


def test_a_source_says_in_one_line_what_happens_to_images(tmp_path: Path) -> None:
    spec = write(tmp_path, NET)
    data = folder_with(tmp_path / "d", np.zeros((9, 9, 3), np.uint8))
    said = load_source(spec, data=data, input_shape=(1, 1, 6, 6)).notes
    assert "resized to a short side of 6, cropped in the centre to 6×6" in said[0]
    assert said[1].startswith("WARNING: no mean and std")
    told = load_source(
        spec, data=data, input_shape=(1, 1, 6, 6), transform=Transform(mean=(0.1,), std=(0.3,))
    ).notes
    assert len(told) == 1
    assert "(x - 0.1) / 0.3" in told[0]
    none = load_source(spec, data=data, input_shape=(1, 1, 6, 6), transform=NAMED["none"]).notes
    assert len(none) == 1


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (Transform(mean=(0.5, 0.5)), "--mean has 2 numbers"),
        (Transform(std=(0.0,)), "not positive"),
        (Transform(crop=5), "--crop 5"),
        (Transform(resize=4), "--resize 4"),
    ],
)
def test_a_transform_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, transform: Transform, said: str
) -> None:
    spec = write(tmp_path, NET)
    data = folder_with(tmp_path / "d", np.zeros((9, 9, 3), np.uint8))
    error = refused(spec, data=data, input_shape=(1, 1, 6, 6), transform=transform)
    assert said in str(error)


def test_a_transform_is_refused_where_there_are_no_images(tmp_path: Path) -> None:
    spec = write(tmp_path, NET)
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 6, 6), np.float32))
    array = refused(spec, data=tmp_path / "x.npy", input_shape=(1, 1, 6, 6), transform=Transform())
    assert "is an array" in str(array)
    assert "name a folder" in str(refused(spec, input_shape=(1, 1, 6, 6), transform=Transform()))


def test_transforms_are_read_from_the_files_of_hugging_face_and_timm(tmp_path: Path) -> None:
    face, timm = tmp_path / "preprocessor_config.json", tmp_path / "config.json"
    face.write_text(
        json.dumps({"image_mean": [0.5], "image_std": [0.25], "size": {"shortest_edge": 256}})
    )
    timm.write_text(json.dumps({"pretrained_cfg": {"mean": [0.5], "std": [0.2], "crop_pct": 0.9}}))
    assert named_transform(str(face)) == Transform(256, mean=(0.5,), std=(0.25,))
    assert named_transform(str(timm)) == Transform(crop_share=0.9, mean=(0.5,), std=(0.2,))
    face.write_text('{"size": 3}')
    with pytest.raises(SourceError, match="neither image_mean"):
        named_transform(str(face))
    with pytest.raises(SourceError, match="imagenet, clip"):
        named_transform("imagenette")


def test_options_change_a_named_transform() -> None:
    assert DataOptions().transform() is None
    changed = DataOptions("imagenet", None, "0.5", 300).transform()
    assert changed == Transform(300, 0.875, None, NAMED["imagenet"].mean, (0.5,))
    with pytest.raises(RecipeError, match="--mean takes numbers"):
        DataOptions(mean="a,b").transform()


def test_a_model_of_a_package_says_that_its_weights_may_be_random() -> None:
    source = load_source("torch.nn:Identity", input_shape=(1, 3))
    assert any("may be random" in note for note in source.notes)


def test_a_model_of_torchvision_has_its_default_weights_and_their_transform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(1)
    trained = models.squeezenet1_1(weights=None)
    weights = models.get_model_weights("squeezenet1_1").DEFAULT
    kept = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    torch.save(trained.state_dict(), kept)
    data = folder_with(tmp_path / "d", np.full((300, 400, 3), 255, np.uint8))
    source = load_source("torchvision.models:squeezenet1_1", data=data, input_shape=(1, 3, 64, 64))
    assert all(x.equal(y) for x, y in zip(source.model.parameters(), trained.parameters()))
    assert "DEFAULT" in source.notes[0] or "IMAGENET1K" in source.notes[0]
    assert "- 0.485, 0.456, 0.406) / 0.229" in source.notes[1]
    assert len(source.notes) == 2


def test_the_size_of_images_is_that_of_torchvisions_default_weights() -> None:
    models = pytest.importorskip("torchvision.models")
    assert torchvision_shape(models.squeezenet1_1) == (1, 3, 224, 224)
    assert torchvision_shape(models.inception_v3) == (1, 3, 299, 299)
    assert torchvision_shape(models.video.r3d_18) is None
    assert torchvision_shape(models.detection.ssdlite320_mobilenet_v3_large) is None
    assert torchvision_shape(nn.Identity) is None


def test_weights_of_torchvision_that_cannot_be_had_are_random_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    source = load_source("torchvision.models:squeezenet1_1", input_shape=(1, 3, 64, 64))
    assert source.notes[0].startswith("WARNING: the weights are random")

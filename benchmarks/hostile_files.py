"""Files as somebody else may have made them, for the campaign `files` of faults.py.

Each is given to a command. Nothing that it holds may be run, nothing written outside of the working folder, no order
reach the terminal, and the answer is one sentence or success.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

NAMES = (
    "\x1b[31mred",
    "\x9b2J",
    "\x1b]0;title\x07",
    "a[/]b",
    "\u202eevil",
    "../../outside/x",
    "x" * 400,
)
"""Names of tensors, layers and files."""
MARK = "mark"
"""The file beside the working folder that code of a hostile file would write."""
IMAGE_MODEL = """
import torch
from torch import nn
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
def example_inputs(): return torch.zeros(2, 1, 8, 8)
"""


class Payload:
    """Writes the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@dataclass(frozen=True)
class Place:
    """The working folder with model.py and a result, net; code that is run writes `mark`."""

    folder: Path
    mark: Path

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        )
        return path


Case = tuple[str, Callable[[Place], list[str]]]
"""What it is, and what makes it and gives the command line."""


def _weights(place: Place, name: str, content: bytes) -> list[str]:
    place.write(name, content)
    return ["inspect", "model.py", "--weights", name]


def _saved(value: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **settings)
    return buffer.getvalue()


def _with_pickle(place: Place) -> bytes:
    """What torch.save writes, with another pickle in it."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(_saved({"a": torch.zeros(2)}))) as good,
        zipfile.ZipFile(buffer, "w") as changed,
    ):
        for name in good.namelist():
            evil = pickle.dumps(Payload(place.mark))
            changed.writestr(name, evil if name.endswith("data.pkl") else good.read(name))
    return buffer.getvalue()


def _safetensors(header: str | bytes, length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def weights() -> Iterator[Case]:
    for name in ("w.pt", "w.pth", "w.bin", "w.safetensors"):
        yield (
            f"a pickle with code, {name}",
            lambda p, n=name: _weights(p, n, pickle.dumps(Payload(p.mark))),
        )
        yield (
            f"torch.save of code, {name}",
            lambda p, n=name: _weights(p, n, _saved(Payload(p.mark))),
        )
    old = {"_use_new_zipfile_serialization": False}
    yield (
        "torch.save of code, the old form",
        lambda p: _weights(p, "w.pt", _saved(Payload(p.mark), **old)),
    )
    yield "another pickle within torch.save", lambda p: _weights(p, "w.pt", _with_pickle(p))
    yield "a pickle that imports", lambda p: _weights(p, "w.pt", b"cevil\nrun\n(tR.")
    yield (
        "a header without an end",
        lambda p: _weights(p, "w.safetensors", _safetensors("{}", 2**62)),
    )
    yield "a nested header", lambda p: _weights(p, "w.safetensors", _safetensors("[" * 100_000))
    far = '{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 99999999]}}'
    yield "offsets beyond the file", lambda p: _weights(p, "w.safetensors", _safetensors(far))
    for name in NAMES:
        state = {name: torch.zeros(2), f"{name}.weight": torch.zeros(2)}
        yield f"weights named {name[:20]!r}", lambda p, s=state: _weights(p, "w.pt", _saved(s))


def _data(place: Place, name: str, content: bytes) -> list[str]:
    place.write(name, content)
    data = str(Path(name).parent) if "/" in name else name
    return ["quantize", "model.py", "--steps", "0", "--data", data, "--out", "made"]


def _npy(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def _npz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _png(width: int, height: int) -> bytes:
    """One without pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _postscript(mark: Path) -> bytes:
    return (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({mark}) (w) file closefile\n".encode()
    )


def data() -> Iterator[Case]:
    objects = lambda p: _npy(np.array([Payload(p.mark)] * 4, dtype=object))  # noqa: E731
    yield "an array of objects", lambda p: _data(p, "x.npy", objects(p))
    yield "an archive of objects", lambda p: _data(p, "x.npz", _npz({"x.npy": objects(p)}))
    yield "a pickle as an array", lambda p: _data(p, "x.npy", pickle.dumps(Payload(p.mark)))
    zeros = bytes(300 << 20)
    yield (
        "an archive that fills memory",
        lambda p: _data(p, "x.npz", _npz({"x.npy": _npy(np.zeros((1, 1, 8, 8)))[:128] + zeros})),
    )
    outside = {"../../outside/x.npy": _npy(np.zeros((9, 1, 8, 8)))}
    yield "an archive of a path outside", lambda p: _data(p, "x.npz", _npz(outside))
    much = "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 1, 8, 8)}\n"
    yield "an array that claims much", lambda p: _data(p, "x.npy", _npy_header(much))
    code = "{'descr': '<f4', 'fortran_order': __import__('os').system('touch %s'), 'shape': (1,)}\n"
    yield "code in a header", lambda p: _data(p, "x.npy", _npy_header(code % p.mark))
    yield "a nested header of an array", lambda p: _data(p, "x.npy", _npy_header("(" * 60_000))
    yield "a huge picture", lambda p: _data(p, "d/a.png", _png(60_000, 60_000))
    yield "a large picture", lambda p: _data(p, "d/a.png", _png(12_000, 12_000))
    for name in ("a.png", "a.jpg", "a.tif", "a.gif"):
        yield f"PostScript as {name}", lambda p, n=name: _data(p, f"d/{n}", _postscript(p.mark))
    yield "a text as a picture", lambda p: _data(p, "d/a.png", b"<svg onload=alert(1)>")
    for name in NAMES[:-2]:
        yield (
            f"a picture named {name[:20]!r}",
            lambda p, n=name: _data(p, f"d/{n.replace('/', '_')}.png", b"broken"),
        )


def _recipe(place: Place, text: str | bytes) -> list[str]:
    place.write("r.toml", text)
    return ["inspect", "model.py", "--recipe", "r.toml"]


def settings() -> Iterator[Case]:
    yield "nested TOML", lambda p: _recipe(p, "a = " + "[" * 100_000)
    yield "no text", lambda p: _recipe(p, b"\xff\xfe\x00")
    yield (
        "a pattern of stars",
        lambda p: _recipe(p, f'[[override]]\nmatch = "{"*a" * 40}b"\nweight_bits = 4'),
    )
    for name in NAMES:
        told = json.dumps(name)
        yield f"a recipe named {name[:20]!r}", lambda p, t=told: _recipe(p, f"name = {t}")
        yield f"a key named {name[:20]!r}", lambda p, t=told: _recipe(p, f"{t} = 3")
    for text in (
        "[" * 100_000,
        '{"mean": "x", "std": [1]}',
        '{"image_mean": [1e999], "image_std": [0]}',
        "3",
    ):
        yield f"a transform {text[:20]}", lambda p, t=text: [
            *_data(p, "d/a.png", _png(8, 8)), "--transform", str(p.write("t.json", t).name),
        ]  # fmt: skip


def _facts(place: Place, change: Callable[[dict[str, Any]], None]) -> list[str]:
    path = place.folder / "net" / "program.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    return ["validate", "net"]


def _renamed(place: Place, name: str, command: str) -> list[str]:
    """The result with a name in the place of a layer's, an input's and an output's."""
    for file in ("graph.json", "program.json"):
        path = place.folder / "net" / file
        path.write_text(path.read_text().replace('"input_1"', json.dumps(name)))
    model = onnx.load(place.folder / "net" / "model.onnx")
    for node in model.graph.node:
        node.name = f"{name}{node.name}"
    onnx.save(model, place.folder / "net" / "model.onnx")
    return [command, "net"]


def _external(place: Place, location: str) -> list[str]:
    model = onnx.load(place.folder / "net" / "model.onnx")
    one = model.graph.initializer[0]
    one.ClearField("raw_data")
    one.data_location = onnx.TensorProto.EXTERNAL
    one.external_data.add(key="location", value=location)
    (place.folder / "net" / "model.onnx").write_bytes(model.SerializeToString())
    return ["validate", "net"]


def _linked(place: Place, name: str, target: str) -> list[str]:
    place.write("x.npy", _npy(np.zeros((40, 1, 8, 8), np.float32)))
    path = place.folder / "net" / name
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return ["export", "net"]


def folders() -> Iterator[Case]:
    for source in ("os:abort", "evil.py", "../outside/evil.py", "http://x/evil.py", "\x1b[31m"):
        yield (
            f"a result whose source is {source!r}",
            lambda p, s=source: _facts(p, lambda f: f.update(source=s)),
        )
    for name in NAMES:
        for command in ("validate", "inspect", "export"):
            yield (
                f"a result with names {name[:20]!r} ({command})",
                lambda p, n=name, c=command: _renamed(p, n, c),
            )
    for location in ("../../outside/secret", "/etc/passwd", "..", "", "\x1b[31m"):
        yield f"data of an ONNX file in {location!r}", lambda p, at=location: _external(p, at)
    for name, target in (
        (".done", "../../outside"), (".new", "../../outside"), ("model.onnx", "../../outside/secret"),
        ("graph.json", "/dev/zero"), ("student.safetensors", "/etc/passwd"), (".lock", "../../outside/secret"),
        ("recipe.toml", "/dev/null"), ("program.json", "."),
    ):  # fmt: skip
        yield f"a link from {name} to {target}", lambda p, n=name, t=target: _linked(p, n, t)
    yield "a pipe in the place of graph.json", _pipe
    yield "a lock that is a link", _locked


def _pipe(place: Place) -> list[str]:
    path = place.folder / "net" / "graph.json"
    path.unlink()
    os.mkfifo(path)
    return ["inspect", "net"]


def _locked(place: Place) -> list[str]:
    _linked(place, ".lock", "../../outside/secret")
    return [
        "quantize",
        "model.py",
        "--input-shape",
        "1,1,8,8",
        "--out",
        "net",
        "--data",
        "x.npy",
        "--steps",
        "0",
    ]


def cases() -> list[Case]:
    return [*weights(), *data(), *settings(), *folders()]


def prepared(scratch: Path, result: Path) -> Place:
    """A working folder beside one that nothing may be written to."""
    place = Place(scratch / "work", scratch / MARK)
    outside = scratch / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (outside / "evil.py").write_text(f"open({str(place.mark)!r}, 'w').close()\n")
    place.write("model.py", IMAGE_MODEL)
    place.write("evil.py", f"open({str(place.mark)!r}, 'w').close()\ndef run(): pass\n")
    shutil.copytree(result, place.folder / "net")
    return place


def state_of(scratch: Path) -> dict[str, bytes]:
    """All files that are not in the working folder."""
    files = [path for path in scratch.rglob("*") if path.is_file() and "work" not in path.parts]
    return {str(path): path.read_bytes() for path in files}

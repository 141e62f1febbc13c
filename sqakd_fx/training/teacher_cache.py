"""The teacher's outputs on disk, for data that gives the same samples in every epoch.

A sample is known by a checksum of its content, so that its place in an epoch does not matter. Outputs lie in
`rows-START-DIGEST.safetensors` files, written atomically; DIGEST is the start of the SHA-256 of the teacher and the
file, and a file with another one is dropped: its samples are computed again. A batch with a new sample is computed
whole, so that the teacher always sees the same shapes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from sqakd_fx.diagnostics.wording import no_effect
from sqakd_fx.errors import StorageError, TrainingError
from sqakd_fx.storage import delete_files, storage_error, write_atomically

_KEY_BYTES = 16
_BYTES_IN_MEMORY = 64 << 20


@dataclass(frozen=True)
class _Block:
    """Consecutive rows: their checksums (rows, 16) in uint8, and the leaves of the teacher's output."""

    keys: Tensor
    leaves: tuple[Tensor, ...]

    def packed(self) -> bytes:
        return save({"keys": self.keys} | {f"output.{i}": x for i, x in enumerate(self.leaves)})


class TeacherCache:
    """Gives the teacher's outputs, from `folder` where they are known.

    `teacher` is what computes an output, `fingerprint` tells it from other teachers. Outputs whose leaves are not
    all tensors with the samples on the first axis are computed every time, with a note.
    """

    def __init__(
        self,
        teacher: nn.Module,
        folder: Path,
        fingerprint: bytes,
        on_note: Callable[[str], None],
    ) -> None:
        self.teacher, self.folder, self.on_note = teacher, folder, on_note
        self.fingerprint = fingerprint
        self.rows: dict[bytes, int] = {}
        self.blocks: list[_Block] = []
        self.starts: list[int] = []
        self.saved = 0
        self.most: float = 0.0
        self.structure: TreeSpec | None = None
        self.works = self.writes = True
        for path in sorted(folder.glob("rows-*.safetensors")):
            self._take(path)

    def expect(self, samples: int) -> None:
        """At least so many different samples may come before the data counts as changing."""
        self.most = max(self.most, samples)

    def __call__(self, given: tuple[Tensor, ...], placed: tuple[Tensor, ...]) -> Any:
        """The teacher's output for inputs as the data gave them; `placed` are the same on the device.

        Raises:
            TrainingError: more different samples than the data has.
        """
        if not self.works:
            return self.teacher(*placed)
        keys = self._keys(given)
        new = [i for i, key in enumerate(keys) if key not in self.rows]
        if new or self.structure is None:
            output = self.teacher(*placed)
            leaves, structure = tree_flatten(output)
            if not all(isinstance(x, Tensor) and x.ndim and len(x) == len(keys) for x in leaves):
                self.works = False
                self.on_note(
                    no_effect("cache_teacher", "an output of the teacher has no sample axis")
                )
                return output
            self.structure = structure
            self._add({keys[i]: i for i in new}, leaves)
        self._require_same_data()
        device = next((x.device for x in placed if isinstance(x, Tensor)), torch.device("cpu"))
        found = self._gather([self.rows[key] for key in keys])
        return tree_unflatten([leaf.to(device) for leaf in found], self.structure)

    def flush(self) -> None:
        """Write what is only in memory; where that fails, outputs are no longer kept on disk."""
        if self.saved == len(self.blocks) or not self.writes:
            return
        parts = self.blocks[self.saved :]
        block = _Block(
            torch.cat([part.keys for part in parts]),
            tuple(torch.cat(leaves) for leaves in zip(*(part.leaves for part in parts))),
        )
        start = self.starts[self.saved]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = block.packed()
            path = self.folder / f"rows-{start:010d}-{self._digest(content)}.safetensors"
            write_atomically(path, lambda temporary: _fill(temporary, content))
        except (StorageError, OSError) as error:
            told = storage_error(error, self.folder) if isinstance(error, OSError) else error
            self.on_note(f"the teacher's outputs stay in memory from here: {told}")
            self.writes = False
            return
        self.blocks[self.saved :], self.starts[self.saved :] = [_load(path)], [start]
        self.saved = len(self.blocks)

    def _take(self, path: Path) -> None:
        """Use a file of an earlier process, or delete it where it is damaged or does not go on from here."""
        start, _, digest = path.stem.removeprefix("rows-").partition("-")
        if digest != self._digest(path.read_bytes()) or int(start) != len(self.rows):
            path.unlink()
            return
        block = _load(path)
        self.starts.append(len(self.rows))
        for key in block.keys:
            self.rows[bytes(key.numpy())] = len(self.rows)
        self.blocks.append(block)
        self.saved = len(self.blocks)

    def _add(self, positions: dict[bytes, int], leaves: Sequence[Tensor]) -> None:
        """Keep rows of an output, by checksum."""
        if not positions:
            return
        chosen = torch.tensor(list(positions.values()), device=leaves[0].device)
        keys = torch.frombuffer(bytearray(b"".join(positions)), dtype=torch.uint8)
        kept = tuple(leaf.detach()[chosen].cpu().contiguous() for leaf in leaves)
        self.starts.append(len(self.rows))
        self.blocks.append(_Block(keys.reshape(-1, _KEY_BYTES), kept))
        for key in positions:
            self.rows[key] = len(self.rows)
        waiting = (leaf.nbytes for block in self.blocks[self.saved :] for leaf in block.leaves)
        if sum(waiting) >= _BYTES_IN_MEMORY:
            self.flush()

    def _gather(self, rows: Sequence[int]) -> list[Tensor]:
        """Rows of all leaves, as new contiguous tensors."""
        place = [bisect.bisect_right(self.starts, row) - 1 for row in rows]
        order = sorted(range(len(rows)), key=place.__getitem__)
        found = [leaf.new_empty((len(rows), *leaf.shape[1:])) for leaf in self.blocks[0].leaves]
        for index, group in itertools.groupby(order, key=place.__getitem__):
            to = list(group)
            at = torch.tensor([rows[i] - self.starts[index] for i in to])
            for own, leaf in zip(found, self.blocks[index].leaves, strict=True):
                own[to] = leaf[at]
        return found

    def _require_same_data(self) -> None:
        if len(self.rows) > self.most:
            raise TrainingError(
                f"cache_teacher needs the same samples in every epoch, but {len(self.rows)} different ones "
                f"came where an epoch has at most {self.most:.0f}: the data is augmented, so take "
                "cache_teacher out of the recipe"
            )

    def _digest(self, content: bytes) -> str:
        return hashlib.sha256(self.fingerprint + content).hexdigest()[:16]

    def _keys(self, inputs: tuple[Tensor, ...]) -> list[bytes]:
        """A checksum for each sample, of its part of every tensor and of all that is common."""
        count = len(next(x for x in inputs if isinstance(x, Tensor) and x.ndim))
        common = hashlib.blake2b(self.fingerprint, digest_size=_KEY_BYTES)
        columns = []
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor) and x.ndim and len(x) == count:
                columns.append(_bytes(x).reshape(count, -1).numpy())
            else:
                common.update(
                    _bytes(x).numpy().tobytes() if isinstance(x, Tensor) else repr(x).encode()
                )
        keys = []
        for parts in zip(*columns):
            key = common.copy()
            for part in parts:
                key.update(part)
            keys.append(key.digest())
        return keys


def fingerprint_of(teacher: nn.Module, precision: str) -> bytes:
    """A checksum of what a teacher computes: its weights, its code where it is a graph, and the precision."""
    digest = hashlib.blake2b(f"{precision} {getattr(teacher, 'code', '')}".encode(), digest_size=32)
    for name, tensor in teacher.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor).numpy().tobytes())
    return digest.digest()


def clear_teacher_cache(folder: Path) -> None:
    """Delete all outputs of a finished run."""
    delete_files(folder, "*.safetensors")


def _bytes(x: Tensor) -> Tensor:
    """The content in the order of the axes, whatever the strides; uint8."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _load(path: Path) -> _Block:
    """Outputs stay in the file, which is mapped into memory."""
    tensors = load_file(path)
    keys = tensors.pop("keys")
    return _Block(keys, tuple(tensors[f"output.{i}"] for i in range(len(tensors))))


def _fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)

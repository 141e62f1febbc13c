"""Training checkpoints that survive a kill at any moment: safetensors and JSON, never a pickle.

A checkpoint is `step-00000123.safetensors`, whose header carries the JSON state, and
`step-00000123.json`, written after it with its size and SHA-256. One without the other, or with
another checksum, is damaged; the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sqakd_fx.errors import StorageError
from sqakd_fx.storage import delete_files, read_json, storage_error, write_atomically, write_json

_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a run: tensors by name, and everything else as JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint and delete all but the newest `keep`.

    Raises:
        StorageError: no space or no permission; earlier checkpoints are untouched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in checkpoint.tensors.items()
    }
    header = {"state": json.dumps(checkpoint.state), "step": str(checkpoint.step)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    write_json(
        path.with_suffix(".json"),
        {
            "format": _FORMAT,
            "step": checkpoint.step,
            "bytes": path.stat().st_size,
            "sha256": _checksum(path),
        },
    )
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        with suppress(OSError):
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink()
    return path


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each damaged one that was skipped."""
    notes: list[str] = []
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            return _load(path), notes
        except (
            StorageError,
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:
            notes.append(f"checkpoint {path.name} cannot be used and was skipped ({error})")
    return None, notes


def clear_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a finished run."""
    delete_files(folder, "step-*")


def _load(path: Path) -> Checkpoint:
    facts = read_json(path.with_suffix(".json"))
    if not isinstance(facts, dict):
        raise StorageError("what stands beside it is no record of it")
    if facts["format"] != _FORMAT:
        raise StorageError("it is of another version of this program")
    if facts["bytes"] != path.stat().st_size or facts["sha256"] != _checksum(path):
        raise StorageError("its checksum differs")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = json.loads(header["state"])
    if not isinstance(state, dict):
        raise StorageError("its state is no record")
    return Checkpoint(int(header["step"]), tensors, state)


def _checksum(path: Path) -> str:
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name and JSON values."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in whole["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"values": values, "groups": whole["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Restore what `pack_optimizer` gave, in the memory format of each parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter).copy_(tensor)
        entries.setdefault(int(index), {})[key] = tensor
    for index, values in state["values"].items():
        entries.setdefault(int(index), {}).update(values)
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in state["groups"]
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})

"""What a run began with, saved beside each checkpoint: a run goes on only with the same.

    recipe       every key that training follows         model, weights    checksums of the graphs and the float weights
    data         batches an epoch, shapes, and a checksum of the first batch where the data repeats itself

More steps are allowed: that has a meaning. How a step is computed may differ as well, with a note, because the result
then differs in its last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_fx.engine.distributed import process_count
from sqakd_fx.errors import TrainingError
from sqakd_fx.training.step_batches import StepBatches

_LENGTH = ("epochs", "steps")
_WITHOUT_EFFECT = frozenset(
    ("name", "device", "checkpoint_seconds", "checkpoint_steps", "tensorboard", "profile", "opset")
)
_COMPUTED = frozenset(
    (
        "compile", "cuda_graph", "deterministic", "tf32", "checkpoint_activations", "cache_teacher",
        "shard_teacher", "workers", "early_stop",
    )
)  # fmt: skip
_VARIES = "varies"
_SHOWN = 60

Beginning = dict[str, Any]
"""JSON values."""


def beginning_of(student: nn.Module, teacher: nn.Module, batches: StepBatches) -> Beginning:
    """What tells this run from others; draws the first batch twice, to see whether the data repeats itself."""
    recipe = batches.recipe.model_dump(mode="json")
    first, again = ([_described(x) for x in batches.first()] for _ in range(2))
    return {
        "recipe": {k: v for k, v in recipe.items() if k not in (*_LENGTH, *_WITHOUT_EFFECT)},
        "steps": batches.total,
        "model": _checksum(
            "\0".join(getattr(one, "code", "") for one in (student, teacher)).encode()
        ),
        "weights": _weights(teacher),
        "processes": process_count(),
        "device": batches.device.type,
        "batches": batches.steps_per_epoch,
        "shapes": [shape for shape, _ in first],
        "first": [content for _, content in first] if first == again else _VARIES,
    }


def _described(x: Any) -> tuple[str, str]:
    if not isinstance(x, Tensor):
        return type(x).__name__, repr(x)[:_SHOWN]
    return f"{x.dtype} {tuple(x.shape)}", _checksum(_bytes(x))


def _weights(teacher: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode(errors="surrogatepass"))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Compared:
    """How a run differs from the one whose checkpoint it goes on from: what forbids that, and what is only told."""

    forbidding: tuple[str, ...]
    told: tuple[str, ...]


def compared(began: Beginning, now: Beginning) -> Compared:
    """The differences of two beginnings, each in a few words."""
    keys = {**began["recipe"], **now["recipe"]}
    changed = {
        key: f"{key} was {_short(began['recipe'].get(key))} and is {_short(now['recipe'].get(key))}"
        for key in keys
        if began["recipe"].get(key) != now["recipe"].get(key)
    }
    forbidding = [text for key, text in changed.items() if key not in _COMPUTED]
    told = [text for key, text in changed.items() if key in _COMPUTED]
    if began["model"] != now["model"] and not forbidding:
        forbidding.append("the model has another graph")
    if began["weights"] != now["weights"] and began["model"] == now["model"]:
        forbidding.append("the model has other weights")
    if not forbidding:
        forbidding += _of_data(began, now)
    told += [
        f"{what} was {began[key]} and is {now[key]}"
        for key, what in (("processes", "the number of processes"), ("device", "the device"))
        if began[key] != now[key]
    ]
    if now["steps"] < began["steps"]:
        forbidding.append(f"the run had {began['steps']} steps and would have {now['steps']}")
    elif now["steps"] > began["steps"]:
        told.append(
            f"the run had {began['steps']} steps and has {now['steps']}, which the learning rate follows"
        )
    return Compared(tuple(forbidding), tuple(told))


def _of_data(began: Beginning, now: Beginning) -> list[str]:
    if began["batches"] != now["batches"]:
        return [f"the data had {began['batches']} batches an epoch and has {now['batches']}"]
    if began["shapes"] != now["shapes"]:
        return [f"a batch had {', '.join(began['shapes'])} and has {', '.join(now['shapes'])}"]
    repeats = _VARIES not in (began["first"], now["first"])
    return (
        ["the data has another first batch"] if repeats and began["first"] != now["first"] else []
    )


def require_same_run(began: Any, now: Beginning) -> str | None:
    """What a user is to be told, if anything; raises TrainingError where a checkpoint is of another run."""
    try:
        found = compared(began, now)
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainingError(OTHER_RUN) from error
    if found.forbidding:
        raise TrainingError(
            f"--resume goes on only with what the run began with: {'; '.join(found.forbidding)}, so give the same "
            "again, or start again without --resume"
        )
    told = [
        *found.told,
        *(["the data gives other batches each time"] if now["first"] == _VARIES else []),
    ]
    return told_in_one(told) if told else None


OTHER_RUN = "the checkpoint does not fit this model and recipe: start again without --resume"


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def told_in_one(told: Sequence[str]) -> str:
    """One note of all that is only told."""
    return f"the result will not be that of a run without a stop, bit for bit: {'; '.join(told)}"

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sqakd_fx.errors import SourceError
from sqakd_fx.source.batches import (
    Batch,
    Batches,
    Loading,
    evaluation_batches,
    input_batches,
    labelled_batches,
)
from sqakd_fx.source.items import Form

N = 10
IMAGES = torch.arange(N * 4, dtype=torch.float32).reshape(N, 1, 2, 2)
LABELS = torch.arange(N)


class Samples(Dataset[Any]):
    """IMAGES in any form that an item can have."""

    def __init__(self, form: Any, length: int = N) -> None:
        self.form, self.length = form, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.form(index)


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def size_of(batch: Batch) -> int:
    return len(batch.args[0] if batch.args else next(iter(batch.kwargs.values())))


def unlabelled(data: Any, **options: Any) -> Batches[Batch]:
    return input_batches(data, *form_and_loading(**options))


def labelled(data: Any, **options: Any) -> Batches[tuple[Batch, Any]]:
    return labelled_batches(data, *form_and_loading(drop_last=False, **options))


def form_and_loading(
    n_inputs: int = 1,
    input_names: tuple[str, ...] = ("x",),
    example_ndim: int | None = 4,
    batch_size: int = 4,
    **loading: Any,
) -> tuple[Form, Loading]:
    return Form(n_inputs, input_names, example_ndim), Loading(batch_size, **loading)


def first_inputs(batches: Iterable[Batch]) -> list[Tensor]:
    return [batch.args[0] if batch.args else batch.kwargs["x"] for batch in batches]


PAIRS = TensorDataset(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("data", "sizes", "ignored"),
    [
        pytest.param(IMAGES, [4, 4], False, id="tensor"),
        pytest.param(IMAGES.numpy(), [4, 4], False, id="array"),
        pytest.param(IMAGES[:3], [3], False, id="fewer samples than a batch"),
        pytest.param(PAIRS, [4, 4], True, id="dataset of pairs"),
        pytest.param(Samples(lambda i: IMAGES[i]), [4, 4], False, id="dataset of tensors"),
        pytest.param(Samples(lambda i: (IMAGES[i], None)), [4, 4], True, id="label None"),
        pytest.param(Samples(lambda i: {"x": IMAGES[i], "id": "a"}), [4, 4], True, id="dicts"),
        pytest.param(Samples(lambda i: IMAGES[i : i + 1]), [1] * N, False, id="items are batches"),
        pytest.param(list(IMAGES), [4, 4], False, id="list of samples"),
        pytest.param([IMAGES, IMAGES[:3]], [10, 3], False, id="list of batches"),
        pytest.param([{"x": IMAGES, "labels": LABELS}], [10], True, id="list of dicts"),
        pytest.param([UserDict(x=IMAGES)], [10], False, id="mapping that is not a dict"),
        pytest.param(DataLoader(PAIRS, batch_size=3), [3, 3, 3, 1], True, id="loader as it is"),
        pytest.param(DataLoader(PAIRS, batch_size=None), [4, 4], True, id="loader of samples"),
        pytest.param(Stream(list(IMAGES)), [4, 4], False, id="stream of samples"),
        pytest.param(Stream([IMAGES]), [10], False, id="stream of batches"),
        pytest.param(DataLoader(Stream(list(IMAGES)), batch_size=5), [5, 5], False, id="loader"),
    ],
)
def test_every_form_of_data_gives_the_same_batches_in_every_epoch(
    data: Any, sizes: list[int], ignored: bool
) -> None:
    batches = unlabelled(data)
    assert not batches.labels_ignored
    for _ in range(2):
        drawn = list(batches)
        assert [size_of(batch) for batch in drawn] == sizes
        values = first_inputs(drawn)
        assert all(value.dtype == torch.float32 and value.ndim == 4 for value in values)
        torch.testing.assert_close(values[0], IMAGES[: sizes[0]])
    assert batches.labels_ignored is ignored
    assert batches.length() in (len(sizes), None)


def test_length_is_none_where_the_data_does_not_say() -> None:
    assert unlabelled(Stream([IMAGES])).length() is None
    assert unlabelled(DataLoader(Stream([1]))).length() is None
    assert unlabelled(PAIRS).length() == 2
    assert unlabelled(DataLoader(PAIRS, batch_size=3)).length() == 4
    assert labelled(PAIRS).length() == 3


@pytest.mark.parametrize("items", [list(IMAGES), [(IMAGES, LABELS)]], ids=["samples", "batches"])
def test_a_generator_is_drawn_once_and_lasts_several_epochs(items: list[Any]) -> None:
    drawn = []

    def generate() -> Iterator[Any]:
        for item in items:
            drawn.append(item)
            yield item

    batches = unlabelled(generate())
    assert not drawn
    epochs = [first_inputs(batches) for _ in range(3)]
    assert len(drawn) == len(items)
    torch.testing.assert_close(epochs[0], epochs[2])


def test_an_endless_generator_can_be_drawn_from() -> None:
    batches = unlabelled(iter(lambda: IMAGES, None))
    assert size_of(next(iter(batches))) == N


@pytest.mark.parametrize("data", [IMAGES, PAIRS, list(IMAGES)], ids=["tensor", "dataset", "list"])
def test_the_order_depends_on_seed_and_epoch_alone(data: Any) -> None:
    def order(seed: int, epoch: int, noise: int) -> list[float]:
        torch.manual_seed(noise)
        batches = unlabelled(data, shuffle=True, seed=seed, batch_size=5)
        batches.set_epoch(epoch)
        state = torch.get_rng_state()
        values = [float(v) for value in first_inputs(batches) for v in value[:, 0, 0, 0]]
        assert torch.equal(torch.get_rng_state(), state)
        return values

    assert sorted(order(3, 1, 0)) == [float(v) for v in IMAGES[:, 0, 0, 0]]
    assert order(3, 1, 0) == order(3, 1, 1)
    assert order(3, 1, 0) != order(3, 2, 0)
    assert order(3, 1, 0) != order(4, 1, 0)


def test_ready_batches_keep_their_order() -> None:
    values = first_inputs(unlabelled([IMAGES, IMAGES + 1, IMAGES + 2], shuffle=True, seed=1))
    assert [float(value[0, 0, 0, 0]) for value in values] == [0, 1, 2]


def test_several_inputs_come_from_a_tuple_or_from_a_dict() -> None:
    pair = Samples(lambda i: (IMAGES[i], float(i), i))
    batch = next(iter(unlabelled(pair, n_inputs=2)))
    assert torch.equal(batch.args[1], torch.arange(4, dtype=torch.float32))
    named = Samples(lambda i: {"x": IMAGES[i], "y": np.float64(i), "label": i})
    batch = next(iter(unlabelled(named, n_inputs=2, input_names=("x", "y"))))
    assert list(batch.kwargs) == ["x", "y"]
    assert batch.kwargs["y"].dtype == torch.float32


def test_without_an_example_a_dataset_gives_samples_and_a_list_gives_batches() -> None:
    assert size_of(next(iter(unlabelled(PAIRS, example_ndim=None)))) == 4
    assert size_of(next(iter(unlabelled([IMAGES], example_ndim=None)))) == N


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        pytest.param(PAIRS, [4, 4, 2], id="dataset"),
        pytest.param(Samples(lambda i: {"x": IMAGES[i], "target": i}), [4, 4, 2], id="dicts"),
        pytest.param([(IMAGES.numpy(), LABELS.numpy())], [10], id="batches of arrays"),
        pytest.param(((IMAGES[i], i) for i in range(N)), [4, 4, 2], id="generator"),
        pytest.param(DataLoader(PAIRS, batch_size=5), [5, 5], id="loader"),
    ],
)
def test_labelled_batches_keep_every_sample_with_its_target(data: Any, sizes: list[int]) -> None:
    batches = labelled(data)
    for _ in range(2):
        pairs = list(batches)
        assert [size_of(batch) for batch, _ in pairs] == sizes
        assert torch.equal(torch.cat([target for _, target in pairs]), LABELS)
        assert torch.equal(torch.cat(first_inputs(batch for batch, _ in pairs)), IMAGES)


def fails(index: int) -> Tensor:
    if index == 5:
        raise OSError("disk gone.\nmore")
    return IMAGES[index]


def refuses(index: int) -> Tensor:
    raise SourceError(f"the image {index}.png is broken: remove it")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param([], "is empty", id="empty list"),
        pytest.param(iter([]), "is empty", id="empty generator"),
        pytest.param(IMAGES[:0], "is empty", id="empty tensor"),
        pytest.param(Samples(None, 0), "is empty", id="empty dataset"),
        pytest.param(DataLoader(PAIRS, batch_size=99, drop_last=True), "drop_last", id="loader"),
        pytest.param({"x": IMAGES}, "one dict with the keys x", id="one dict"),
        pytest.param([{"pixels": IMAGES}], "pixels, none of which is an input", id="unknown keys"),
        pytest.param(["a.png"], "items of type str", id="not a tensor"),
        pytest.param([IMAGES[0, 0]], "2 axes where the example input has 4", id="axes"),
        pytest.param(IMAGES[None], "5 axes", id="tensor with an axis too many"),
        pytest.param((IMAGES, LABELS), "1 axes where the example", id="a bare pair of tensors"),
        pytest.param(7, "not iterable", id="not iterable"),
        pytest.param(Samples(refuses), "^the image 0.png is broken: remove it$", id="own error"),
        pytest.param(Samples(lambda i: IMAGES[0, :, : i + 1]), "equal size", id="ragged"),
        pytest.param([IMAGES.to_sparse()], "the data has a sparse_coo tensor", id="sparse"),
        pytest.param([IMAGES.to("meta")], "the data has a meta tensor", id="without values"),
        pytest.param(Samples(None, -1), r"__len__\(\) should return >= 0", id="length below 0"),
        pytest.param(list, "not iterable", id="a type"),
        pytest.param([np.array([[[[None]]]])], "batch 0 fails with TypeError", id="object array"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_one_sentence(data: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message) as raised:
        list(unlabelled(data))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [None, 0, 1], ids=["dataset", "loader", "worker process"])
def test_an_error_while_loading_names_the_batch_and_the_line(workers: int | None) -> None:
    data: Any = Samples(fails)
    if workers is not None:
        data = DataLoader(data, batch_size=4, num_workers=workers)
    with pytest.raises(SourceError, match=r"batch 1 fails with OSError: disk gone") as raised:
        list(unlabelled(data))
    assert "\n" not in str(raised.value)
    if not workers:
        assert raised.value.location is not None
        assert raised.value.location.startswith(f"{__file__}:")


def test_an_own_error_in_a_worker_process_stays_one_sentence() -> None:
    data = DataLoader(Samples(refuses), batch_size=4, num_workers=1)
    with pytest.raises(SourceError, match=r"^the image 0.png is broken: remove it$"):
        list(unlabelled(data))


def noisy(index: int) -> tuple[Tensor, int]:
    return IMAGES[index] + torch.rand(()), index


def test_worker_processes_give_the_same_samples_in_the_same_order() -> None:
    data = Samples(lambda index: (IMAGES[index], index), length=N)
    here, there = (
        first_inputs(unlabelled(data, shuffle=True, workers=workers)) for workers in (0, 2)
    )
    assert len(here) == len(there) > 1
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_what_a_dataset_draws_in_a_worker_process_follows_the_epoch() -> None:
    batches = unlabelled(Samples(noisy), shuffle=True, workers=1)
    drawn = []
    for epoch in (0, 0, 1):
        batches.set_epoch(epoch)
        drawn.append(torch.cat(first_inputs(batches)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0].sort(0).values, drawn[2].sort(0).values)


def test_an_error_in_a_worker_process_of_ours_names_the_batch() -> None:
    with pytest.raises(SourceError, match=r"batch 1 fails with OSError: disk gone") as raised:
        list(unlabelled(Samples(fails), workers=1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [IMAGES, [(IMAGES,)], [{"x": IMAGES}]])
def test_data_without_labels_is_refused_where_they_are_needed(data: Any) -> None:
    with pytest.raises(SourceError, match="training data gives items without a label"):
        list(labelled(data))


@pytest.mark.parametrize("data", [IMAGES, [(IMAGES,)], [{"x": IMAGES}]])
def test_evaluation_data_may_hold_inputs_alone(data: Any) -> None:
    found = list(evaluation_batches(data, *form_and_loading(drop_last=False)))
    assert sum(
        len(batch.args[0] if batch.args else batch.kwargs["x"]) for batch, _ in found
    ) == len(IMAGES)
    assert all(target is None for _, target in found)


@pytest.mark.parametrize("item", [(IMAGES, None), {"x": IMAGES, "klass": 1}])
def test_evaluation_data_with_something_beside_inputs_needs_a_label(item: Any) -> None:
    with pytest.raises(SourceError, match="evaluation data gives items without a label"):
        list(evaluation_batches([item], *form_and_loading(drop_last=False)))


def test_too_few_inputs_are_refused() -> None:
    with pytest.raises(SourceError, match="1 elements, but the model takes 2 inputs"):
        list(unlabelled(IMAGES, n_inputs=2))


def test_interrupting_the_data_interrupts_the_run() -> None:
    def stop(index: int) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(unlabelled(Samples(stop)))

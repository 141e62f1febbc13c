"""The training loop: parts of a batch, memory, divergence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import distilled
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from sqakd_fx.engine.compilation import earns_compiling_back, has_compiler
from sqakd_fx.engine.determinism import repeatable_arithmetic
from sqakd_fx.errors import SourceError, TrainingError
from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.inputs import training_inputs
from sqakd_fx.training.held_out import Split, split_data
from sqakd_fx.training.keeping import Keeping
from sqakd_fx.training.loop import Distilled, distil
from sqakd_fx.training.progress import Listener, StepReport
from sqakd_fx.training.step_batches import EpochBatches, TrainingData

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


class Hungry(nn.Module):
    """Raises as an allocator does where more than `most` samples come at once in training."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.net(x)  # type: ignore[no-any-return]


def trained(
    most: int = 99,
    *settings: str,
    data: EpochBatches = lambda epoch: [(ROWS,)],
    held_out: Sequence[tuple[Tensor, ...]] = (),
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda note: None,
    **keeping: Any,
) -> tuple[Distilled, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    recipe = resolve_recipe(
        "w4a4", settings=["steps=6", "optimizer=sgd", "compile=never", *settings]
    )
    program = build_program(model, ROWS, recipe)
    calibrate(program.student, [(ROWS,)])
    student = Hungry(program.student, most)
    teacher = program.teacher
    done = distil(
        student,  # type: ignore[arg-type]
        teacher,
        TrainingData(data, 1, held_out),
        recipe,
        torch.device("cpu"),
        Keeping(**keeping),
        Listener(on_report, on_note),
    )
    return done, program.student.state_dict()


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch() -> None:
    _, whole = trained()
    _, parts = trained(99, "accumulate=5")
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_a_batch_that_does_not_fit_is_divided_and_the_log_says_so() -> None:
    _, whole = trained()
    done, parts = trained(most=7)
    assert "4 parts" in done.notes[-1]
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_a_sample_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TrainingError, match="batch_size"):
        trained(most=0)


BAD = pytest.mark.parametrize("factor", [float("nan"), 1e5], ids=["not finite", "finite"])


def test_a_diverging_loss_rolls_back_three_times_and_then_stops_with_a_name() -> None:
    notes: list[str] = []
    with pytest.raises(TrainingError, match=r"diverges.*in front of net\.\w+.*learning_rate"):
        trained(
            99,
            "checkpoint_steps=1",
            data=lambda epoch: [(ROWS * (1e5 if epoch == 4 else 1),)],
            on_note=notes.append,
        )
    assert ["back to step 4, learning rate times 0.5" in note for note in notes] == [1, 0, 0]
    assert notes[2].endswith("learning rate times 0.125")


def test_data_that_is_not_finite_is_named_at_once() -> None:
    bad = lambda epoch: [(ROWS * (float("nan") if epoch == 4 else 1),)]  # noqa: E731
    with pytest.raises(SourceError, match="batch 0 of epoch 4 of the data holds NaN"):
        trained(99, "checkpoint_steps=1", data=bad)


@BAD
def test_a_run_that_diverges_once_goes_on_from_before(factor: float) -> None:
    seen: list[int] = []

    def once(epoch: int) -> list[tuple[Tensor]]:
        seen.append(epoch)
        return [(ROWS * (factor if seen.count(4) == 1 and epoch == 4 else 1),)]

    done, state = trained(99, "checkpoint_steps=1", data=once)
    assert seen == [0, 1, 2, 3, 4, 4, 4, 5]  # the second 4 is looked at for NaN
    assert done.steps == 6
    assert all(bool(torch.isfinite(v).all()) for v in state.values())


def test_measuring_agreement_changes_nothing_and_reaches_the_reports() -> None:
    reports: list[StepReport] = []
    _, plain = trained()
    done, measured = trained(held_out=[(ROWS[:5],), (ROWS[5:9],)], on_report=reports.append)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert reports[-1].agreement == done.agreement
    assert done.agreement is not None
    assert 0 <= done.agreement <= 1


def test_early_stopping_ends_where_the_agreement_no_longer_grows() -> None:
    settings = ["learning_rate=1e-12", "quantizer_learning_rate=1e-12", "early_stop=2"]
    done, _ = trained(99, *settings, held_out=[(ROWS,)])
    assert done.steps == 3
    assert trained(99, *settings)[0].steps == 6


@pytest.mark.parametrize(
    "data", [torch.arange(50), np.arange(50), list(range(50)), TensorDataset(torch.arange(50))]
)
def test_held_out_samples_are_the_last_ones_and_no_longer_trained_on(data: Any) -> None:
    split = split_data(data, 256)
    assert split.held_out is not None
    assert (len(split.training), len(split.held_out)) == (48, 2)
    assert [int(x[0]) if isinstance(x, tuple) else int(x) for x in split.held_out] == [48, 49]


@pytest.mark.parametrize(
    ("settings", "held_out"),
    [
        ({"batch_size": 4}, [[96, 97, 98, 99]]),
        ({"batch_size": 4, "shuffle": True, "drop_last": True}, [[96, 97, 98, 99]]),
        ({"batch_size": 2, "num_workers": 1}, [[96, 97], [98, 99]]),
        ({"batch_size": 30, "drop_last": True}, [[95, 96, 97, 98, 99]]),
        ({"batch_size": 47, "collate_fn": torch.tensor}, [[94, 95, 96, 97, 98, 99]]),
        ({"batch_size": None}, [95, 96, 97, 98, 99]),
    ],
)
def test_a_loader_keeps_its_last_samples_back_and_its_settings(
    settings: dict[str, Any], held_out: list[Any]
) -> None:
    loader = DataLoader(range(100), **settings)  # type: ignore[arg-type]
    split = split_data(loader, 256)
    assert [x.tolist() if isinstance(x, Tensor) else x for x in split.held_out or ()] == held_out
    first = Subset(range(100), range(100 - int(np.size(held_out))))  # type: ignore[arg-type]
    torch.manual_seed(1)
    expected = [torch.as_tensor(x) for x in DataLoader(first, **settings)]
    torch.manual_seed(1)
    given = [torch.as_tensor(x) for x in split.training]
    assert len(split.training) == len(given) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(given, expected))
    for name in ("batch_size", "num_workers", "collate_fn", "dataset", "drop_last", "pin_memory"):
        assert getattr(split.training, name) is getattr(loader, name)


def test_drawing_held_out_samples_of_a_loader_leaves_its_generator_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(range(40), shuffle=True, generator=generator)  # type: ignore[arg-type]
    split = split_data(loader, 256)
    before = generator.get_state()
    assert [int(x) for x in split.held_out or ()] == [38, 39]
    assert torch.equal(generator.get_state(), before)
    first = Subset(range(40), range(38))  # type: ignore[arg-type]
    again = torch.Generator().manual_seed(3)
    expected = [int(x) for x in DataLoader(first, shuffle=True, generator=again)]
    assert [int(x) for x in split.training] == expected


class OwnLoader(DataLoader[Any]): ...


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(50))


MANY: Any = range(50)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (iter(MANY), "no length"),
        (torch.arange(19), "19 items"),
        (DataLoader(MANY[:19]), "19 items"),
        (DataLoader(Stream()), "no length"),
        (OwnLoader(MANY), "a OwnLoader, not a plain DataLoader"),
        (DataLoader(MANY, sampler=range(7)), "own sampler, a range"),
        (DataLoader(MANY, sampler=SequentialSampler(MANY[:9])), "own sampler"),
        (DataLoader(MANY, sampler=RandomSampler(MANY, num_samples=9)), "own sampler"),
        (DataLoader(MANY, sampler=RandomSampler(MANY, replacement=True)), "own sampler"),
        (DataLoader(MANY, batch_sampler=[[0, 1], [1, 2]]), "own batch sampler, a list"),
        (DataLoader(MANY, batch_size=50, drop_last=True), "drops incomplete batches"),
    ],
)
def test_data_that_cannot_be_divided_is_left_whole_for_a_reason(data: Any, reason: str) -> None:
    split = split_data(data, 256)
    assert split.training is data
    assert split.held_out is None
    assert reason in str(split.reason)
    assert split_data(data, 0) == Split(data, None)


class Noisy(Dataset[Any]):
    """Samples with noise of every generator that an augmentation may draw from."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return ROWS[index % 24] + torch.randn(6) + np.random.rand() + random.random()


def test_held_out_inputs_are_the_same_in_every_run_and_disturb_no_generator() -> None:
    model = nn.Linear(6, 4).eval()
    recipe = resolve_recipe("w4a4", settings=["seed=5"])
    program = build_program(model, ROWS[:2], recipe)
    drawn = []
    for noise in (1, 2):
        loader = DataLoader(Noisy(), batch_size=2, shuffle=True)
        inputs = training_inputs(loader, program)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        drawn.append(inputs.held_out())
        assert torch.equal(torch.get_rng_state(), state)
        assert inputs.undivided is None
    (first,), (second,) = drawn
    assert first[0].shape == (2, 6)
    assert torch.equal(first[0], second[0])


@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler here")
def test_a_compiler_that_fails_costs_speed_and_nothing_else() -> None:
    _, eager = trained()
    reports: list[StepReport] = []
    no_compiler = {"cpp.cxx": ("/bin/false",), "force_disable_caches": True}
    with torch._inductor.config.patch(no_compiler):
        done, fallen_back = trained(99, "compile=always", on_report=reports.append)
    assert not done.compiled
    assert "compiling failed" in done.notes[-1]
    assert reports[-1].compile_seconds == 0
    assert all(torch.equal(eager[name], fallen_back[name]) for name in eager)


def test_compiling_is_for_runs_that_earn_it_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    small, large = (
        build_program(net.eval(), torch.zeros(2, 3, side, side), resolve_recipe("w4a4"))
        for side in (8, 200)
    )

    def earns(program: Program, steps: int, batch: int, device: str = "cpu") -> bool:
        return earns_compiling_back(program.student, steps, batch, torch.device(device))

    assert earns(large, 100, 64)
    assert not earns(large, 2, 64)
    assert not earns(large, 100, 1)
    assert not earns(small, 1000, 64)
    assert earns(small, 30_000, 64, "cuda")
    assert not earns(small, 10_000, 64, "cuda")
    assert earns(large, 10_000, 64, "cuda")


def test_an_average_of_weights_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    _, whole = trained(99, "weight_average=0.9")
    batches = [(ROWS,)]

    def interrupted(epoch: int) -> list[tuple[Tensor]]:
        if epoch == 3:
            raise KeyboardInterrupt
        return batches

    settings = ["weight_average=0.9", "checkpoint_steps=1"]
    with pytest.raises(KeyboardInterrupt):
        trained(99, *settings, data=interrupted, checkpoints=tmp_path)
    _, resumed = trained(99, *settings, checkpoints=tmp_path, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler here")
def test_a_compiled_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    settings = ["compile=always", "checkpoint_steps=1"]
    torch._dynamo.reset()
    done, whole = trained(99, *settings)
    assert done.compiled

    def interrupted(epoch: int) -> list[tuple[Tensor]]:
        if epoch == 4:
            raise KeyboardInterrupt
        return [(ROWS,)]

    torch._dynamo.reset()
    with pytest.raises(KeyboardInterrupt):
        trained(99, *settings, data=interrupted, checkpoints=tmp_path)
    torch._dynamo.reset()
    done, resumed = trained(99, *settings, checkpoints=tmp_path, resume=True)
    assert done.compiled
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Counting:
    """A callback that counts what it is asked."""

    name = "counting"

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def before_step(self, step: int, total: int) -> bool:
        self.calls.append(("before", step, total))
        return False

    def after_step(self, step: int, total: int) -> None:
        self.calls.append(("after", step, total))

    def finish(self) -> None:
        self.calls.append(("finish", -1, -1))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


def test_a_craft_acts_around_every_step_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Counting()
    monkeypatch.setattr("sqakd_fx.training.loop.low_bit_callbacks", lambda *given: [callback])
    trained(99)
    around = [(when, step, 6) for step in range(6) for when in ("before", "after")]
    assert callback.calls == [*around, ("finish", -1, -1)]


def test_a_run_leaves_torchs_settings_as_they_were() -> None:
    memory = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory)
    with repeatable_arithmetic(torch.device("cpu"), tf32=True, deterministic=False):
        assert torch.are_deterministic_algorithms_enabled()
        assert not memory.fill_uninitialized_memory
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        memory.fill_uninitialized_memory,
    )


def test_a_network_of_volumes_trains() -> None:
    volumes = torch.randn(6, 2, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)).eval()
    recipe = resolve_recipe("w4a4", steps=2)
    program = build_program(model, volumes, recipe)
    calibrate(program.student, [(volumes,)])
    assert distilled(program, volumes, recipe).steps == 2

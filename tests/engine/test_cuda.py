"""Training and validation on a GPU; skipped where there is none."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ResidualNet, with_lively_batch_norm
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sqakd_fx.engine.cuda_graph import RecordedStep
from sqakd_fx.engine.determinism import repeatable_arithmetic
from sqakd_fx.engine.prefetch import ahead
from sqakd_fx.pipeline import quantize
from sqakd_fx.program import build_program, distillation_teacher
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.runtime.session import CUDA, providers
from sqakd_fx.training.checkpoint import clear_checkpoints
from sqakd_fx.training.keeping import Keeping
from sqakd_fx.training.loop import Distilled, distil
from sqakd_fx.training.step_batches import TrainingData

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

GPU = torch.device("cuda")
NOT_RECORDED = "not recorded"


class Waiting(nn.Module):
    """Looks at a value that the GPU computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().abs().amax()) >= 0 else -x


def batches(steps: int, sizes: tuple[int, ...] = (16,)) -> list[tuple[Tensor, ...]]:
    chance = torch.Generator().manual_seed(1)
    size = itertools.cycle(sizes)
    return [(torch.randn(next(size), 3, 16, 16, generator=chance),) for _ in range(steps)]


def trained(
    *settings: str,
    data: list[tuple[Tensor, ...]] | None = None,
    middle: nn.Module | None = None,
    teacher_outputs: Path | None = None,
) -> tuple[Distilled, dict[str, Tensor], dict[str, Tensor]]:
    """What a run says, and the student's state before and after it, on the CPU."""
    torch.manual_seed(0)
    model = with_lively_batch_norm(ResidualNet(), (1, 3, 16, 16))
    data = batches(12) if data is None else data
    recipe = resolve_recipe(
        "w4a4",
        settings=[
            f"steps={len(data)}", "optimizer=sgd", "learning_rate=0.1", "compile=never",
            "batch_norm=absorb", *settings,
        ],
    )  # fmt: skip
    program = build_program(model, data[0][0], recipe)
    student = program.student.to(GPU)
    calibrate(student, [(data[0][0].to(GPU),)])
    if middle is not None:
        pooled = student.get_submodule("pool_output_quantizer")
        pooled.register_forward_hook(lambda module, args, y: middle(y))
    before = {name: x.cpu().clone() for name, x in student.state_dict().items()}
    # TF32, or sums in another order, make two runs of one course differ by whole codes, and then go apart
    with repeatable_arithmetic(GPU, tf32=False, deterministic=True):
        done = distil(
            student,
            distillation_teacher(program).to(GPU),
            TrainingData(lambda epoch: data, len(data)),
            recipe,
            GPU,
            Keeping(teacher_outputs=teacher_outputs),
        )
    return done, before, {name: x.cpu() for name, x in student.state_dict().items()}


def assert_same_course(
    before: dict[str, Tensor], one: dict[str, Tensor], other: dict[str, Tensor]
) -> None:
    for name, start in before.items():
        if start.is_floating_point() and start.ndim > 1:
            moved = (one[name] - start).norm()
            assert moved > 0, name
            assert (one[name] - other[name]).norm() <= 0.02 * moved, name


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("accumulate=3",),
        ("feature_weight=1.0", 'features="sums"', "learning_rate=0.02"),
        ("feature_fade=0.5", "feature_weight=1.0", 'features="sums"', "learning_rate=0.02"),
        ("progressive=[8]", "progressive_share=0.5"),
        ("mu=0.1", 'mu_schedule="linear"'),
        ("weight_average=0.9",),
    ],
    ids=lambda settings: settings[0] if settings else "plain",
)
def test_a_recorded_run_learns_what_a_plain_run_learns(settings: tuple[str, ...]) -> None:
    _, before, plain = trained(*settings, "cuda_graph=false")
    done, _, recorded = trained(*settings)
    assert not [note for note in done.notes if NOT_RECORDED in note]
    assert_same_course(before, plain, recorded)


def test_batches_of_other_sizes_between_recorded_ones_are_learned_from() -> None:
    data = batches(14, (16, 16, 16, 16, 16, 5))
    _, before, plain = trained("cuda_graph=false", data=data)
    _, _, recorded = trained(data=data)
    assert_same_course(before, plain, recorded)


def test_outputs_of_the_teacher_from_a_cache_are_those_it_gives(tmp_path: Path) -> None:
    data = batches(3) * 4
    _, before, plain = trained("cuda_graph=false", data=data)
    _, _, cached = trained("cache_teacher=true", data=data, teacher_outputs=tmp_path)
    assert_same_course(before, plain, cached)


def test_a_step_that_waits_for_the_gpu_runs_as_it_is_and_says_so() -> None:
    _, before, plain = trained("cuda_graph=false", middle=Waiting())
    done, _, fallen_back = trained(middle=Waiting())
    assert [note for note in done.notes if NOT_RECORDED in note]
    assert_same_course(before, plain, fallen_back)
    assert torch.rand(2, device=GPU).isfinite().all()


def test_a_recording_draws_new_random_numbers_each_time() -> None:
    weight = nn.Parameter(torch.ones(1000, device=GPU))

    def step(inputs: tuple[Any, ...]) -> Tensor:
        weight.grad = None
        loss = (nn.functional.dropout(weight) * inputs[0].to(GPU)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    recorded = RecordedStep(step, [weight], GPU, lambda note: None)
    losses = [float(recorded((torch.ones(1000),))) for _ in range(8)]
    assert recorded.recording is not None
    assert len(set(losses)) > 5


def test_batches_arrive_on_the_gpu_in_order_and_whole() -> None:
    sent = [(torch.full((1 << 20,), float(i)), i, torch.tensor([i])) for i in range(9)]

    def data() -> Iterator[tuple[Any, ...]]:
        yield from sent

    for (x, i, y), (sent_x, sent_i, sent_y) in zip(ahead(data(), GPU), sent, strict=True):
        assert x.is_cuda
        assert i == sent_i
        assert torch.equal(x.cpu(), sent_x)
        assert torch.equal(y.cpu(), sent_y)
    assert list(ahead(iter(()), GPU)) == []


def test_compiled_recorded_steps_learn_what_plain_steps_learn() -> None:
    _, before, plain = trained("cuda_graph=false")
    done, _, compiled = trained("compile=always")
    assert done.compiled
    assert not [note for note in done.notes if NOT_RECORDED in note]
    assert_same_course(before, plain, compiled)


def free_memory() -> None:
    """Also that of recordings of runs that are over."""
    gc.collect()
    torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_on_the_gpu_is_divided() -> None:
    data = batches(6, (2048,))
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    whole, _, _ = trained(data=data)
    needed = torch.cuda.max_memory_allocated()
    free_memory()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(0.7 * needed / total)
    try:
        divided, _, _ = trained(data=data)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory: every batch is computed in" in note for note in divided.notes)
    assert divided.loss == pytest.approx(whole.loss, rel=0.1)


@pytest.mark.parametrize(("precision", "workers"), [("float32", 0), ("bf16", 2)])
def test_what_a_gpu_trained_is_what_is_exported(
    precision: str, workers: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = with_lively_batch_norm(ResidualNet(), (1, 3, 16, 16))
    recipe = {"preset": "w4a4", "steps": 30, "precision": precision, "workers": workers}
    result = quantize(
        model,
        TensorDataset(torch.randn(256, 3, 16, 16)),
        example_inputs=torch.randn(2, 3, 16, 16),
        recipe=recipe | {"device": "cuda", "batch_size": 32},
        out=tmp_path / "out",
    )
    assert result is not None
    assert result.validation.failures == ()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    ran = {runtime["provider"] for runtime in report["validation"]["runtimes"]}
    assert ran == set(providers())


class Killed(Exception):
    """Ends a run from outside."""


def test_a_deterministic_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_lively_batch_norm(ResidualNet(), (1, 3, 16, 16))
    data = batches(12)
    recipe = resolve_recipe(
        "w4a4", settings=["steps=12", "checkpoint_steps=1", "batch_norm=absorb"]
    )

    def run(given: Callable[[], Iterable[tuple[Tensor, ...]]], resume: bool) -> dict[str, Tensor]:
        program = build_program(model, data[0][0], recipe)
        student = program.student.to(GPU)
        with repeatable_arithmetic(GPU, tf32=True, deterministic=True):
            calibrate(student, [(data[0][0].to(GPU),)])
            distil(
                student,
                distillation_teacher(program).to(GPU),
                TrainingData(lambda epoch: given(), 12),
                recipe,
                GPU,
                Keeping(checkpoints=tmp_path, resume=resume),
            )
        return {name: x.cpu() for name, x in student.state_dict().items()}

    def broken() -> Iterator[tuple[Tensor, ...]]:
        yield from data[:9]
        raise Killed

    whole = run(lambda: data, False)
    again = run(lambda: data, False)
    clear_checkpoints(tmp_path)
    with pytest.raises(Killed):
        run(broken, False)
    resumed = run(lambda: data, True)
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, resumed[name]), name


def test_onnx_runtime_gets_its_cuda_provider_where_the_package_has_it() -> None:
    import onnxruntime

    assert (CUDA in providers()) == (CUDA in onnxruntime.get_available_providers())

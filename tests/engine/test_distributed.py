"""Two processes are one: the same losses as a single process with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import distilled
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

import sqakd_fx
from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.engine.distributed import is_everywhere, process_group, synchronized
from sqakd_fx.engine.sharded_teacher import sharded
from sqakd_fx.errors import TrainingError
from sqakd_fx.program import build_program, distillation_teacher
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.features import training_pair
from sqakd_fx.training.optimizer import make_optimizer
from sqakd_fx.training.step import GradientStep

CPU = torch.device("cpu")
MODEL = """
import torch
from torch import nn
torch.set_num_threads(1)
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5),
    )
    for _ in range(10):  # statistics that are not quite the data's make a loss far above rounding
        net(train_data())
    return net
def example_inputs(): return torch.zeros(2, 1, 8, 8)
def train_data():
    return torch.randn(95, 1, 8, 8, generator=torch.Generator().manual_seed(1))
"""
SETTINGS = [
    "--steps",
    "12",
    "--set",
    "checkpoint_steps=1",
    "--set",
    "batch_size=33",
    "--set",
    "optimizer=sgd",
    "--set",
    "learning_rate=0.05",
    "--set",
    "batch_norm=absorb",
    "--set",
    "quantizer_learning_rate=1e-4",
    "--set",
    "loss=kl",
]


def losses(folder: Path, launcher: list[str], *more: str) -> list[float]:
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "-m",
            "sqakd_fx",
            "quantize",
            "model.py",
            "--out",
            "out",
            *SETTINGS,
            *more,
        ],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("deploy.py") == 1
    return [
        json.loads(line)["loss"]
        for line in (folder / "out" / "train.jsonl").read_text().splitlines()
    ]


SHARDED = ["--set", "shard_teacher=true"]
FEATURES = ["--set", "feature_weight=0.5", "--set", "features=sums", "--set", "learning_rate=0.01"]
SLOPED = ["--set", "delta=0.1"]


@pytest.mark.parametrize(
    ("family", "both", "of_two"),
    [("lsq", [], []), ("ewgs", SLOPED, []), ("lsq", FEATURES, SHARDED)],
    ids=["lsq", "ewgs", "a sharded teacher with features"],
)
def test_two_processes_have_the_losses_of_one(
    tmp_path: Path, family: str, both: list[str], of_two: list[str]
) -> None:
    # Two processes add in another order than one. While no value lies within 1e-4 of a step of a tie, so that no code
    # changes, all 12 losses agree to 2e-7. One code of 6,912 on the other side of a tie moves a loss by 4e-5, then
    # codes of weights follow: by up to 4e-4 in 6 steps and 2e-3 in 12. So it is of one process whose rows come in
    # another order. A mean over unequal shares that does not weigh them is off by 6e-3 in 6 steps. (Adam would turn a
    # gradient of 1e-9 into a whole step.)
    families = [
        "--bits",
        "w8a8",
        "--set",
        f"weight_family={family}",
        "--set",
        f"activation_family={family}",
        *both,
    ]
    one = losses(tmp_path / "one", [], *families)
    two = losses(
        tmp_path / "two",
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        *families,
        *of_two,
    )
    assert len(one) == len(two) == 12
    assert two[:6] == pytest.approx(one[:6], rel=1e-3)
    assert two == pytest.approx(one, rel=5e-3)
    assert one[-1] < 0.7 * one[0]


def in_a_process(rank: int, folder: str, ports: tuple[int, int]) -> None:
    """What one of two processes finds of all that is asked here."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {
        "gradients": first_gradients(),
        "teacher": sharded_teacher(),
        "normalized": normalized_share(rank),
        "losses": losses_with_adam(),
    }
    found["everywhere"] = [is_everywhere(3, CPU), is_everywhere(rank, CPU)]
    dist.destroy_process_group()
    found["has a result"] = on_a_machine_of_its_own(rank, Path(folder), ports[0])
    if rank == 0:
        found["said"] = said_when_the_other_dies(ports[1])
    torch.save(found, f"{folder}/{rank}.pt")
    if rank == 1:
        leave(ports[1])


def environment(rank: int, port: int) -> dict[str, str]:
    """As torchrun gives it."""
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "WORLD_SIZE": "2", **there}


def on_a_machine_of_its_own(rank: int, folder: Path, port: int) -> bool:
    """A run whose processes share no folder; whether this one has the result."""
    os.environ.update(environment(rank, port))
    torch.manual_seed(0)
    net, rows = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(),
        torch.randn(64, 6),
    )
    recipe = {"steps": 2, "batch_size": 16, "calibration_batches": 1}
    out, quiet = folder / f"machine {rank}" / "out", {"progress": False}
    made = sqakd_fx.quantize(net, rows, example_inputs=rows[:2], recipe=recipe, out=out, **quiet)
    return made is not None


def free_ports() -> tuple[int, int]:
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        return first.getsockname()[1], second.getsockname()[1]


def said_when_the_other_dies(port: int) -> str:
    os.environ.update(environment(0, port))
    x = torch.zeros(3)
    try:
        with process_group(CPU), batch_named("batch 0", (x,)):
            dist.all_reduce(x)
    except TrainingError as error:
        return str(error)
    return ""


def leave(port: int) -> None:
    """End inside of a run, as a process does that the system kills."""
    os.environ.update(environment(1, port))
    with process_group(CPU):
        os._exit(0)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes finds, started once."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(in_a_process, (str(folder), free_ports()), nprocs=2)
    states = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    return [
        state | {"files": sorted(path.name for path in (folder / f"machine {rank}").rglob("*"))}
        for rank, state in enumerate(states)
    ]


def test_a_process_that_dies_is_what_the_others_say_and_no_batch_is_blamed(
    processes: list[dict[str, Any]],
) -> None:
    assert processes[0]["said"].startswith("another process of this run has ended")
    assert "--resume" in processes[0]["said"]


def test_machines_without_a_common_disk_train_and_the_first_one_writes(
    processes: list[dict[str, Any]],
) -> None:
    first, second = processes
    assert first["has a result"]
    assert "model.onnx" in first["files"]
    assert not second["has a result"]
    assert not second["files"]


def test_a_number_of_one_process_alone_is_not_everywhere(processes: list[dict[str, Any]]) -> None:
    assert [process["everywhere"] for process in processes] == [[True, False]] * 2


def losses_with_adam(order: Tensor | None = None) -> list[float]:
    """Of 12 steps at W4A4 on one batch, whose rows come in an order."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
    net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    images = torch.randn(31, 1, 6, 6)
    recipe = resolve_recipe("w4a4", batch_norm="absorb", weight_family="lsq", optimizer="adam")
    program = build_program(net, images[:2], recipe)
    calibrate(program.student, [(images,)])
    student = program.student.train()
    pair = training_pair(student, distillation_teacher(program), recipe)
    step = GradientStep(pair, recipe, torch.device("cpu"), print)
    optimizer, found = make_optimizer(student, recipe), []
    rows = images if order is None else images[order]
    with synchronized(student):
        for _ in range(12):
            loss = step((rows,)).double()
            if dist.is_initialized():
                dist.all_reduce(loss)
                loss /= dist.get_world_size()
            optimizer.step()
            found.append(float(loss))
    return found


def first_gradients() -> dict[str, Tensor]:
    """The gradients of the first step of a small student of two families, from 31 rows in all."""
    found = {}
    for family in ("lsq", "ewgs"):
        torch.manual_seed(0)
        conv, norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
        images = torch.randn(31, 1, 6, 6)
        recipe = resolve_recipe(
            "w4a4", batch_norm="absorb", weight_family=family, activation_family=family, delta=1.0
        )
        program = build_program(net, images[:2], recipe)
        calibrate(program.student, [(images,)])
        student = program.student.train()
        pair = training_pair(student, distillation_teacher(program), recipe)
        step = GradientStep(pair, recipe, torch.device("cpu"), print)
        with synchronized(student):
            step((images,))
        trained = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found |= {f"{family} {name}": gradient.clone() for name, gradient in trained.items()}
    return found


def test_two_processes_with_unequal_shares_have_the_gradients_of_one(
    processes: list[dict[str, Any]],
) -> None:
    wanted = first_gradients()
    for process in processes:
        found = process["gradients"]
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            size = max(
                float(gradient.norm()), 1e-3
            )  # 0 of a gain that the BatchNorm takes out again
            error = float((found[name] - gradient).norm()) / size
            assert error < 2e-4, (name, error)


def apart(losses: list[float], others: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def test_with_adam_two_processes_differ_by_no_more_than_the_order_of_rows(
    processes: list[dict[str, Any]],
) -> None:
    orders = [torch.randperm(31, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    wanted, two = losses_with_adam(), processes[0]["losses"]
    reordered = [losses_with_adam(order) for order in orders]
    assert two == processes[1]["losses"]
    assert two[0] == pytest.approx(wanted[0], rel=1e-6)
    assert apart(two, wanted) <= 3 * max(apart(losses, wanted) for losses in reordered)


def sharded_teacher() -> dict[str, Any]:
    """A teacher's output before and after its weights are divided, and their number."""
    torch.manual_seed(0)
    tied = nn.Linear(8, 8)
    net = nn.Sequential(nn.Linear(6, 8), tied, nn.ReLU(), tied, nn.ReLU(), nn.Linear(8, 4))
    teacher, x = fx.symbolic_trace(net.eval()), torch.randn(3, 6)
    with torch.no_grad():
        wanted = teacher(x)
        made = sharded(teacher, torch.device("cpu"))
        found = [made(x), made(x)]
    kept = sum(p.to_local().numel() for p in made.parameters() if isinstance(p, DTensor))
    whole = sum(p.numel() for p in made.parameters() if not isinstance(p, DTensor))
    return {"wanted": wanted, "found": found, "kept": kept, "whole": whole}


def test_a_sharded_teacher_answers_as_before_and_each_process_keeps_its_share(
    processes: list[dict[str, Any]],
) -> None:
    states = [process["teacher"] for process in processes]
    for state in states:
        assert all(torch.equal(answer, state["wanted"]) for answer in state["found"])
    assert sum(state["kept"] for state in states) == 6 * 8 + 8 + 8 * 4 + 4  # but the tied layer
    assert max(state["kept"] for state in states) <= 50
    assert [state["whole"] for state in states] == [8 * 8 + 8] * 2


def test_one_process_keeps_its_teacher_whole_and_says_so(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = resolve_recipe("w4a4", steps=1, shard_teacher=True)
    program = build_program(residual_net, images[:2], recipe)
    calibrate(program.student, [(images,)])
    done = distilled(program, images, recipe)
    assert "shard_teacher has no effect: there is one process" in done.notes


def normalized_share(rank: int) -> dict[str, Any]:
    """The gradient of a BatchNorm over both processes, each with a share of the rows."""
    x, weights = far_from_zero()
    rows = slice(0, 6) if rank == 0 else slice(6, None)
    own = x[rows].float().requires_grad_()
    norm = nn.BatchNorm2d(3)
    with synchronized(norm):
        y = norm(own)
        (y * weights[rows]).sum().backward()
    assert own.grad is not None
    return {"y": y.detach(), "x": own.grad, "variance": norm.running_var}


def far_from_zero() -> tuple[Tensor, Tensor]:
    """Values whose mean is a thousand times their deviation, and a weight for each."""
    chance = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(10, 3, 4, 4, generator=chance).double()
    return x, torch.randn(10, 3, 4, 4, generator=chance)


def test_batch_norm_over_two_processes_is_that_of_all_rows_also_far_from_zero(
    processes: list[dict[str, Any]],
) -> None:
    first, second = (process["normalized"] for process in processes)
    x, weights = far_from_zero()
    x = x.float().double().requires_grad_()
    norm = nn.BatchNorm2d(3).double()
    y = norm(x)
    (y * weights).sum().backward()
    wanted = {"y": y.detach(), "x": x.grad}
    for name, value in wanted.items():
        torch.testing.assert_close(
            torch.cat([first[name], second[name]]).double(), value, rtol=1e-3, atol=1e-3
        )
    for found in (first, second):
        torch.testing.assert_close(
            found["variance"].double(), norm.running_var, rtol=1e-4, atol=1e-4
        )

"""Activations that 8 bits harm are found after calibration, without labels, and are left in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from sqakd_fx import quantize, stages
from sqakd_fx.errors import TrainingError
from sqakd_fx.ir.outputs import relative_errors
from sqakd_fx.mixed_precision.sensitive import (
    Relief,
    SensitiveTensor,
    choose,
    measure_tensors,
    tolerances_of,
    total_work,
    with_relief,
)
from sqakd_fx.program import Program, build_program, lower, with_recipe
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.keys import Override, Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.stages import relieve
from sqakd_fx.validation.validate import validate

ROWS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Outlier(nn.Module):
    """One channel between `up` and `down` is far larger than the rest, and nothing reads it."""

    def __init__(self, size: float = 300.0) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(8, 16), nn.Linear(16, 128)
        self.down, self.head = nn.Linear(128, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.up.bias[0] = size
            self.down.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x)) - 0.5
        x = nn.functional.gelu(self.up(x))
        return self.head(torch.sigmoid(self.down(x)) - 0.5)  # type: ignore[no-any-return]


def calibrated(model: nn.Module, recipe: Recipe) -> Program:
    program = build_program(model.eval(), (ROWS,), recipe)
    calibrate(program.student, [(ROWS,)], method="minmax")
    return program


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Outlier()


def test_the_tensor_with_the_outlier_is_the_worst(model: nn.Module) -> None:
    worst, second, *_ = measure_tensors(
        calibrated(model, resolve_recipe("w8a8")).student, [(ROWS,)]
    )
    assert "gelu" in worst.name
    assert worst.layers == {"down": (128 + 48) * 16 * len(ROWS)}
    assert worst.error > 10 * second.error


def test_the_measure_is_the_error_of_a_student_with_this_quantizer_alone(model: nn.Module) -> None:
    program = calibrated(model, resolve_recipe("w8a8"))
    measured = {t.name: t.error for t in measure_tensors(program.student, [(ROWS[:8],)])}
    quantizers = quantizers_of(program.student)
    assert all(quantizer.enabled for quantizer in quantizers.values())
    wanted = program.teacher(ROWS[:8])
    for name, error in measured.items():
        for other, quantizer in quantizers.items():
            quantizer.enabled = other == name
        ((found,),) = relative_errors(program.student(ROWS[:8]), wanted, {})
        assert found == pytest.approx(error, rel=1e-3)


def test_a_batch_is_measured_on_its_last_samples(model: nn.Module) -> None:
    student = calibrated(model, resolve_recipe("w8a8")).student
    assert measure_tensors(student, [(ROWS,)]) == measure_tensors(student, [(ROWS[-8:],)])


def test_what_ranges_were_searched_on_is_not_measured_on(model: nn.Module) -> None:
    torch.manual_seed(0)
    data = [10 * torch.randn(8, 8) for _ in range(6)]
    program = build_program(model.eval(), (data[0],), resolve_recipe("w8a8"))
    stages.calibrate(program, data)
    relief = stages.relieve(program, data)[1]
    assert relief is not None
    assert relief.tensors == measure_tensors(program.student, [(x,) for x in data[-2:]])


def test_squares_add_up_to_the_error_of_all_together(model: nn.Module) -> None:
    program = calibrated(model, resolve_recipe("w8a8"))
    tensors = measure_tensors(program.student, [(ROWS[:8],)])
    quantizers = quantizers_of(program.student)
    for quantizer in quantizers.values():
        quantizer.enabled = quantizer.role == "activation"
    ((together,),) = relative_errors(program.student(ROWS[:8]), program.teacher(ROWS[:8]), {})
    (predicted,) = choose(tensors, [1.0], 0.0, 1).before
    assert predicted / 2 < together < predicted * 2


def test_within_the_tolerance_nothing_changes() -> None:
    torch.manual_seed(0)
    program = calibrated(Outlier(size=0.0), resolve_recipe("w8a8"))
    relief = choose(measure_tensors(program.student, [(ROWS,)]), [0.12], 0.5, 10**9)
    assert relief.chosen == ()
    assert relief.after == relief.before


def test_of_many_layers_in_float_a_run_names_the_first() -> None:
    layers = {f"layer{k}": 0.1 for k in range(11)}
    relief = Relief((), (), layers, {}, (0.5,), (0.02,), (0.03,), 0.4)
    program = calibrated(Outlier(size=0.0), resolve_recipe("w8a8"))
    sentence = relief.sentence(program.outputs)
    assert "11 layers and sums read theirs in float (40% of" in sentence
    assert sentence.endswith("layer6, layer7 and 3 more")


def test_no_more_work_leaves_the_integers_than_the_recipe_allows(model: nn.Module) -> None:
    student = calibrated(model, resolve_recipe("w8a8")).student
    tensors, work = measure_tensors(student, [(ROWS,)]), total_work(student)
    assert choose(tensors, [1e-6], 0.0, work).chosen == ()
    assert 0 < choose(tensors, [1e-6], 0.5, work).share <= 0.5


def test_the_file_reads_the_tensor_in_float_and_stores_the_weight_in_codes(
    model: nn.Module, tmp_path: Path
) -> None:
    recipe = resolve_recipe("w8a8")
    program = calibrated(model, recipe)
    tensors = measure_tensors(program.student, [(ROWS,)])
    relief = choose(tensors, [0.02], 0.6, total_work(program.student))
    recipe = with_relief(recipe, relief)
    better = calibrated(model, recipe)
    ((before,),) = relative_errors(program.student(ROWS), program.teacher(ROWS), {})
    ((after,),) = relative_errors(better.student(ROWS), better.teacher(ROWS), {})
    assert after < before / 4
    (note,) = [note for note in better.notes if note.node == "down"]
    assert "in float" in note.reason
    assert "alone costs the outputs" in note.reason

    lowered = lower(better.student).graph_module
    export(better, lowered, tmp_path / "model.onnx")
    checked = validate(better.student, lowered, tmp_path / "model.onnx", [(ROWS,)])
    assert checked.failures == ()
    assert "MatMulNBits" not in {*checked.fusion.other, *checked.fusion.integer}
    stored = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    arrays = [onnx.numpy_helper.to_array(i) for i in stored]
    assert (np.dtype(np.int8), (16, 128)) in [(a.dtype, a.shape) for a in arrays]
    assert not any(a.dtype == np.float32 and a.size > 128 for a in arrays)


@pytest.mark.parametrize(("sensitive", "is_float"), [("auto", True), ("off", False)])
def test_a_run_decides_and_keeps_it_in_its_recipe(
    sensitive: str, is_float: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    quantize(
        Outlier(),
        ROWS,
        example_inputs=ROWS[:2],
        recipe={
            "preset": "w8a8",
            "steps": 0,
            "sensitive": sensitive,
            "tolerance": 0.01,
            "tolerance_work": 0.6,
        },
        out=tmp_path / "out",
    )
    text = (tmp_path / "out" / "recipe.toml").read_text()
    assert ('match = "down"\nexact = true\nfloat = "activations"' in text) == is_float


def test_relieving_a_calibrated_program_is_what_a_run_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Outlier(30.0).eval()
    settings = {"steps": 0, "batch_size": 32, "tolerance": 0.001, "tolerance_work": 0.6}
    recipe = resolve_recipe({"preset": "w8a8", **settings})
    done = quantize(
        model, ROWS, example_inputs=(ROWS[:2],), recipe=recipe, out=tmp_path / "out", progress=False
    )
    assert done is not None
    program = build_program(model, (ROWS[:2],), recipe)
    with pytest.raises(TrainingError, match="not calibrated"):
        relieve(program, ROWS)
    stages.calibrate(program, ROWS)
    relieved, relief = relieve(program, ROWS)
    assert relieved.is_calibrated
    assert relief is not None
    searched = done.report["sensitive_tensors"]
    in_float = {one["quantizer"] for one in searched["tensors"] if one["in_float"]}
    assert in_float == {tensor.name for tensor in relief.chosen} != set()
    assert len(searched["tensors"]) == len(relief.tensors)
    state, wanted = relieved.student.state_dict(), done.student.state_dict()
    assert state.keys() == wanted.keys()
    assert all(value.equal(wanted[name]) for name, value in state.items())


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 0.06), (50.0, 0.03)])
def test_scores_that_are_all_above_zero_are_values(offset: float, tolerance: float) -> None:
    torch.manual_seed(0)
    model = Outlier(size=0.0).eval()
    with torch.no_grad():
        model.head.bias += offset
    program = build_program(model, (ROWS[:2],), resolve_recipe("w8a8"))
    stages.calibrate(program, ROWS)
    enabled = [quantizer.enabled for quantizer in quantizers_of(program.student).values()]
    relief = relieve(program, ROWS)[1]
    assert relief is not None
    assert relief.tolerances == (tolerance,)
    assert enabled == [quantizer.enabled for quantizer in quantizers_of(program.student).values()]


def test_without_a_search_the_program_is_the_same(model: nn.Module) -> None:
    program = build_program(model, (ROWS[:2],), resolve_recipe("w8a8", sensitive="off"))
    stages.calibrate(program, ROWS)
    assert relieve(program, ROWS) == (program, None)


def test_a_program_with_another_recipe_is_what_is_built_from_the_model(model: nn.Module) -> None:
    first, second = resolve_recipe("w8a8"), resolve_recipe("w4a4")
    program = with_recipe(build_program(model, (ROWS[:2],), first), second)
    built = build_program(model, (ROWS[:2],), second)
    assert program.student.code == built.student.code
    assert [one.name for one in program.log] == [one.name for one in built.log]
    assert program.notes == built.notes


IMAGES = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class Convolved(nn.Module):
    """Convolutions of every kind, a clip, a sum, and an activation that is computed in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.slope = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.PReLU(8)
        self.wide, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = x + self.wide(self.slope(self.depthwise(x)))
        return self.head(self.up(x).mean((2, 3)))  # type: ignore[no-any-return]


def _exported(program: Program, path: Path) -> None:
    """It computes what the program's student does."""
    lowered = lower(program.student).graph_module
    export(program, lowered, path)
    assert validate(program.student, lowered, path, [(IMAGES,)]).failures == ()


@pytest.mark.parametrize("batch_norm", ["fold", "absorb"])
def test_all_of_a_convolutional_network_can_be_left_in_float(
    batch_norm: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    recipe = resolve_recipe("w8a8", batch_norm=batch_norm)
    model = Convolved().eval()
    program = build_program(model, (IMAGES,), recipe)
    calibrate(program.student, [(IMAGES,)], method="minmax")
    tensors = measure_tensors(program.student, [(IMAGES,)])
    (behind_depthwise,) = (t for t in tensors if t.name == "depthwise.output_quantizer")
    assert set(behind_depthwise.layers) == {"depthwise"}
    relief = choose(tensors, [1e-9], 1.0, total_work(program.student))
    better = build_program(model, (IMAGES,), with_relief(recipe, relief))
    calibrate(better.student, [(IMAGES,)], method="minmax")
    kept = [q for q in quantizers_of(better.student).values() if q.role == "activation"]
    left = [t for t in tensors if not t.layers]
    assert len(kept) == len(left) < len(tensors) / 2
    _exported(better, tmp_path / "model.onnx")
    stored = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    arrays = [onnx.numpy_helper.to_array(i) for i in stored]
    assert not any(a.dtype == np.float32 and a.size > 8 for a in arrays)
    weights = [a for a in arrays if a.ndim == 4 and a.dtype == np.int8]
    assert len(weights) == 4
    assert max(abs(int(a.min())) for a in weights) > 64  # no product of codes limits them


def test_a_sum_is_left_in_float_by_the_name_of_its_node(tmp_path: Path) -> None:
    recipe = resolve_recipe("w8a8", override=[{"match": "add", "float": True}])
    program = build_program(Convolved().eval(), (IMAGES,), recipe)
    (note,) = [note for note in program.notes if note.node == "add"]
    assert note.reason == "stays in float: override 'add'"


class NormBehind(nn.Module):
    """BatchNorms that no layer in front can take: behind an activation, in front of padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.other = nn.BatchNorm2d(8)
        for norm in (self.norm, self.other):
            norm.running_mean = torch.randn(8)
            norm.weight.data = torch.linspace(0.01, 10.0, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.norm(torch.relu(self.first(x))), (1, 1, 1, 1))
        return self.other(torch.relu(self.last(x)))  # type: ignore[no-any-return]


def test_a_batch_norm_that_stands_alone_is_left_in_float_where_its_result_does_not_fit(
    tmp_path: Path,
) -> None:
    recipe = resolve_recipe("w8a8")
    model = NormBehind().eval()
    program = build_program(model, (IMAGES,), recipe)
    calibrate(program.student, [(IMAGES,)], method="minmax")
    tensors = measure_tensors(program.student, [(IMAGES,)])
    assert all(tensor.layers for tensor in tensors)
    relief = choose(tensors, [1e-9], 1.0, total_work(program.student))
    assert {"norm", "other"} < set(relief.layers)
    assert relief.share == 1.0
    better = build_program(model, (IMAGES,), with_relief(recipe, relief))
    calibrate(better.student, [(IMAGES,)], method="minmax")
    assert all(one.role == "weight" for one in quantizers_of(better.student).values())
    _exported(better, tmp_path / "model.onnx")


class NormOfLayer(NormBehind):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "batch_norm"), [(NormBehind(), "fold"), (NormOfLayer(), "absorb")]
)
def test_an_override_names_a_batch_norm_by_its_module(
    model: nn.Module, batch_norm: str, tmp_path: Path
) -> None:
    """One that a layer could absorb too."""
    recipe = resolve_recipe(
        "w8a8", batch_norm=batch_norm, override=[{"match": "norm", "float": True}]
    )
    program = build_program(model.eval(), (IMAGES,), recipe)
    reasons = [note.reason for note in program.notes if note.node == "norm"]
    assert "stays in float: override 'norm'" in reasons
    calibrate(program.student, [(IMAGES,)], method="minmax")
    _exported(program, tmp_path / "model.onnx")


def test_values_are_asked_for_more_than_scores_are() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls, self.box = nn.Linear(8, 5), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.cls(x), "boxes": self.box(x)}

    program = build_program(Detector().eval(), (ROWS,), resolve_recipe("w8a8"))
    assert tolerances_of(resolve_recipe("w8a8"), program.outputs) == (0.06, 0.03)
    wanted = resolve_recipe("w8a8", tolerance=0.05)
    assert tolerances_of(wanted, program.outputs) == (0.05, 0.05)


def test_values_beside_probabilities_have_the_tolerance_of_values() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 5), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.second(x), self.first(x).softmax(1)

    program = build_program(Detector().eval(), (ROWS,), resolve_recipe("w8a8"))
    assert tolerances_of(resolve_recipe("w8a8"), program.outputs) == (0.03, 0.12)


def test_a_weight_that_costs_little_stays_in_codes_although_it_takes_no_work() -> None:
    little = SensitiveTensor("rnn.weight_quantizer", (0.01,), {"rnn.weight": 0}, is_weight=True)
    much = SensitiveTensor("rnn.other_quantizer", (0.1,), {"rnn.other": 0}, is_weight=True)
    layer = SensitiveTensor("relu", (0.2,), {"conv": 100})
    relief = choose([layer, much, little], [0.05], 1.0, 1000)
    assert relief.chosen == (much, layer)
    assert (set(relief.layers), set(relief.weights)) == ({"conv"}, {"rnn.other"})


class Keys(nn.Module):
    """One channel of the keys is far larger than the rest, and no query reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            self.k.weight[0] *= 1000.0
            self.linear.weight[0], self.linear.bias[0] = 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x) @ self.k(x).transpose(-2, -1)
        return self.out((4.0 * scores).softmax(-1) @ self.v(x))  # type: ignore[no-any-return]


TOKENS = torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(1))


def _relieved(net: nn.Module) -> tuple[Program, Program, Relief]:
    program = build_program(net.eval(), (TOKENS,), "w8a8")
    calibrate(program.student, [(TOKENS,)], method="minmax")
    relieved, relief = relieve(program, [(TOKENS,)])
    assert relief is not None
    return program, relieved, relief


def test_a_product_of_two_activations_is_left_in_float_where_they_do_not_fit() -> None:
    program, relieved, relief = _relieved(Keys())
    assert any(name.startswith("matmul") for name in relief.layers)
    with torch.no_grad():
        wanted = program.teacher(TOKENS)
        before, after = (
            float((one.student(TOKENS) - wanted).norm() / wanted.norm())
            for one in (program, relieved)
        )
    assert before > 0.1
    assert after < 0.05


def test_a_product_in_float_is_exported_as_it_is_trained(tmp_path: Path) -> None:
    _, relieved, _ = _relieved(Keys())
    lowered = lower(relieved.student).graph_module
    exported = export(relieved, lowered, tmp_path / "model.onnx")
    checked = validate(relieved.student, lowered, exported.path, [(TOKENS,)], {})
    assert checked.failures == ()


def test_an_override_of_one_layer_leaves_others_of_its_kind_alone() -> None:
    """A module or a node may be called as an operation is, such as linear."""
    recipe = resolve_recipe("w8a8")
    override = {"match": "linear", "float": "activations"}
    for exact, layers in ((True, 1), (False, 4)):
        made = recipe.model_copy(
            update={"override": (Override.model_validate(override | {"exact": exact}),)}
        )
        program = build_program(Keys().eval(), (TOKENS,), made)
        notes = [note for entry in program.log for note in entry.notes]
        assert sum("reads its input in float" in note.reason for note in notes) == layers


def test_nothing_is_left_in_float_beside_what_cannot_be_and_costs_more() -> None:
    stuck = SensitiveTensor("keys", (0.3,), {})
    little = SensitiveTensor("relu", (0.02,), {"conv": 100})
    much = SensitiveTensor("gelu", (0.2,), {"fc": 100})
    assert choose([stuck, little], [0.05], 1.0, 1000).chosen == ()
    assert choose([stuck, much, little], [0.05], 1.0, 1000).chosen == (much,)

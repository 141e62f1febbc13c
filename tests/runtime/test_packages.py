"""Which package of ONNX Runtime is installed, and what is wrong with it, is said in a sentence."""

from __future__ import annotations

from importlib.metadata import version
from types import ModuleType

import onnxruntime
import pytest

from sqakd_fx.errors import SqakdError
from sqakd_fx.runtime.packages import PACKAGES, clash, installed_runtimes, require_whole


def test_the_installed_package_is_found_with_its_version() -> None:
    found = installed_runtimes()
    assert found
    assert all(found[name] == version(name) for name in found)


def test_both_packages_in_one_folder_are_a_clash_and_one_is_not() -> None:
    assert clash(PACKAGES[:1]) is None
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in (clash(PACKAGES) or "")


def test_a_folder_without_files_is_told_with_what_to_install() -> None:
    """What `import onnxruntime` gives where one of two packages was uninstalled: an empty namespace."""
    with pytest.raises(SqakdError, match=r"pip install --force-reinstall --no-deps onnxruntime"):
        require_whole(ModuleType("onnxruntime"))
    require_whole(onnxruntime)

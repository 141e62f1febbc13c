"""What `export` and `report` call the files that they write into a result folder."""

from __future__ import annotations

from pathlib import Path

from sqakd_fx.exporters.encodings import SUFFIX
from sqakd_fx.exporters.profiles import PROFILES
from sqakd_fx.targets import TARGETS

PAGE = "report.html"


def exported_file(profile: str | None, target: str | None, own: str) -> str:
    """What `export` writes in a result folder whose recipe has the target `own`."""
    if profile:
        return PROFILES[profile][0]
    if target is None or target == own:
        return "model.onnx"
    form = TARGETS[target].profile
    return f"model.{target}{'.onnx' if form is None else Path(PROFILES[form][0]).suffix}"


def made_of_a_result() -> set[str]:
    """All names that they choose, with the files that lie beside an exported one."""
    exported = {exported_file(profile, None, "") for profile in PROFILES}
    exported |= {exported_file(None, target, "") for target in TARGETS}
    beside = {f"{name}.data" for name in exported}
    return {PAGE, *exported, *beside, *(str(Path(name).with_suffix(SUFFIX)) for name in exported)}

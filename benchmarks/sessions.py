"""Do sessions with default options give the bits of sessions with exact products?

    PYTHONPATH=tests python benchmarks/sessions.py [--networks NAME …]

16 networks at W8A8, W4A4 and W2A2, as `container` and as `packed`. One line a file: equal or not; the same of a session
with default options on an emulated processor without VNNI (QEMU); the largest sum of two products that the file can
make, of 32767.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from default_sessions import NETWORKS, compared
from rich.console import Console
from rich.table import Table

SAID = {True: "equal", False: "DIFFERENT", None: "no qemu-x86_64"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    networks = parser.parse_args().networks
    table = Table("network", "bits", "profile", "sessions", "emulated", "largest sum")
    wrong = 0
    for name in networks:
        for bits in ("w8a8", "w4a4", "w2a2"):
            for profile in ("container", "packed"):
                with tempfile.TemporaryDirectory() as folder:
                    found = compared(name, bits, profile, Path(folder))
                same = (found.are_equal, found.emulated)
                wrong += False in same or found.overflows
                said = [SAID[one] for one in same]
                table.add_row(name, bits, profile, *said, str(found.largest))
    Console().print(table)
    raise SystemExit(f"{wrong} files differ or can overflow" if wrong else 0)


if __name__ == "__main__":
    main()

"""Do sessions with default options give the bits of sessions with exact products?

    PYTHONPATH=tests python benchmarks/sessions.py [--networks NAME …]

13 networks at W8A8, W4A4 and W2A2, as `container` and as `packed`. One line a file: equal or not, and the largest sum
of two products that the file can make, of 32767.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from default_sessions import NETWORKS, compared
from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    networks = parser.parse_args().networks
    table = Table("network", "bits", "profile", "sessions", "largest sum")
    wrong = 0
    for name in networks:
        for bits in ("w8a8", "w4a4", "w2a2"):
            for profile in ("container", "packed"):
                with tempfile.TemporaryDirectory() as folder:
                    found = compared(name, bits, profile, Path(folder))
                wrong += not found.are_equal or found.overflows
                said = "equal" if found.are_equal else "DIFFERENT"
                table.add_row(name, bits, profile, said, str(found.largest))
    Console().print(table)
    raise SystemExit(f"{wrong} files differ or can overflow" if wrong else 0)


if __name__ == "__main__":
    main()

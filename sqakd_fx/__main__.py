"""`python -m sqakd_fx`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        import sqakd_fx.passes  # noqa: F401
    except ModuleNotFoundError:
        sys.exit(
            "sqakd_fx was started from its source folder without its passes: run `pip install -e .` "
            "there, or start it from another folder"
        )
    from sqakd_fx.cli.main import main

    main()

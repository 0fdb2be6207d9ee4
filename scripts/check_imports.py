"""Import every module of loftq_cli, and list those that fail although no library they need is missing.

    python scripts/check_imports.py                         # in an environment with the base dependencies only
    python scripts/check_imports.py --without trl datasets  # anywhere: pretend that these are not installed

The exit code is 1 if a module failed.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

# Modules that import an optional library at their top; others load them only when asked for.
OPTIONAL = {"loftq_cli.kernels.gpu": "triton"}


def optional_library(module: str) -> str | None:
    """Return the library that `module` may fail without, if there is one."""
    return next((library for name, library in OPTIONAL.items() if f"{module}.".startswith(f"{name}.")), None)


def import_all(package: str) -> tuple[int, list[str]]:
    """Import every module below `package`; return how many succeeded and a line for each failure."""
    imported, failures = 0, []
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if found.name.endswith(".__main__"):  # runs the command line
            continue
        try:
            importlib.import_module(found.name)
            imported += 1
        except ImportError as error:
            if error.name is None or error.name.split(".")[0] != optional_library(found.name):
                failures.append(f"{found.name}: {error}")
    return imported, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", nargs="*", default=[], metavar="MODULE")
    for name in parser.parse_args().without:
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import name` fail
    imported, failures = import_all("loftq_cli")
    print("\n".join([*failures, f"{imported} modules imported, {len(failures)} failed"]))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

"""The package's version, which the build, the command line and every fingerprint read, and how to install it."""

__version__ = "0.1.0"

# The argument of `pip install` that gets loftq. From the first release on a package index on, "loftq-cli".
REQUIREMENT = "loftq-cli @ git+https://github.com/loftq/loftq"


def pip_install(extra: str = "", *, upgrade: bool = False) -> str:
    """Return the command that installs or upgrades loftq, for a shell; `extra` is one of pyproject.toml's."""
    name, _, place = REQUIREMENT.partition(" ")
    wanted = " ".join(filter(None, [f"{name}[{extra}]" if extra else name, place]))
    return f"pip install {'-U ' if upgrade else ''}'{wanted}'"

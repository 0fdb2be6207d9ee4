"""The package's version: read by the build, the command line and every fingerprint."""

__version__ = "0.1.0"

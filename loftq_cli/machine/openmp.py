"""The time that OpenMP's threads spin before they sleep."""

from __future__ import annotations

from collections.abc import Mapping

# Long enough for one parallel step of LAPACK to follow another (0 makes a full SVD 20 % slower), short enough to leave
# the cores to other threads: GNU OpenMP's own 3 ms make a conversion's bfloat16 products compete with idle threads.
_SPINS = "3000"


def openmp_spin_env(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to the environment of a process before it imports torch, whose OpenMP reads them
    once; none if the user has set them."""
    decided = "GOMP_SPINCOUNT" in environment or "OMP_WAIT_POLICY" in environment
    return {} if decided else {"GOMP_SPINCOUNT": _SPINS}

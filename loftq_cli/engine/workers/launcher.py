"""The processes of a launcher (`accelerate launch`, torchrun, mpirun, srun): the rank of this one, and the one message
that the main process sends to the others.

Accelerate detects the launcher and connects the ranks over gloo. Everything else goes through the output's state
folder, so that no process can wait forever for a rank that died.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from loftq_cli.errors import ExitCode, LoftqError

WAIT = timedelta(hours=1)  # for all ranks to start, and for the main process to download and plan
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass
class World:
    """Several processes that a launcher started with the same command."""

    rank: int
    size: int
    local_rank: int
    _ours: bool
    _announced: bool = field(default=False, repr=False)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def announce(self, run_id: str) -> None:
        """Tell the other ranks that they may join. Only the main process calls this."""
        self._announced = True
        self._broadcast({"run_id": run_id})

    def announce_failure(self, error: BaseException) -> None:
        """Make the other ranks fail with this error, if they are still waiting."""
        if self.main and not self._announced:
            code = error.exit_code if isinstance(error, LoftqError) else ExitCode.FAILED
            with contextlib.suppress(LoftqError):  # the others are gone too
                self._broadcast({"error": str(error), "exit_code": int(code)})

    def receive(self) -> str:
        """Return the id of the run that the main process announces.

        Raises:
            LoftqError: the main process failed or has ended.
        """
        message = self._broadcast(None)
        if "error" in message:
            raise LoftqError(message["error"], exit_code=ExitCode(message["exit_code"]))
        return message["run_id"]

    def _broadcast(self, message: dict[str, Any] | None) -> dict[str, Any]:
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        try:
            box = [message]
            broadcast_object_list(box, from_process=0)
            assert box[0] is not None
            return box[0]
        except RuntimeError as error:
            raise LoftqError(
                f"rank {self.rank} lost its connection to the other ranks ({str(error).splitlines()[0]}): run the same "
                "command again to go on.",
                exit_code=ExitCode.INCOMPLETE,
            ) from error
        finally:
            if self._ours:
                PartialState().destroy_process_group()
                PartialState._reset_state()


def launched_rank() -> int:
    """Return this process's rank in its launcher's world; 0 without a launcher. Imports nothing."""
    _translate_slurm()
    return _first(_RANKS, 0) if _first(_SIZES, 1) > 1 else 0


@contextmanager
def joined_world() -> Iterator[World | None]:
    """Yield the world that this process was started in, None if it is alone; an error in the block also ends the wait
    of the other ranks.

    Raises:
        LoftqError: the ranks cannot connect.
    """
    world = _join()
    try:
        yield world
    except BaseException as error:
        if world is not None:
            world.announce_failure(error)
        raise


def _join() -> World | None:
    _translate_slurm()
    if _first(_SIZES, 1) <= 1:
        return None
    from accelerate import PartialState

    ours = not PartialState._shared_state
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on the number of threads, which the launcher has set
            # cpu=True selects gloo. The device to compute on follows from the local rank.
            state = PartialState(cpu=True, timeout=WAIT) if ours else PartialState()
    except (RuntimeError, ValueError) as error:
        raise LoftqError(
            f"the launcher's processes cannot connect to each other ({str(error).splitlines()[0]}): check MASTER_ADDR, "
            "MASTER_PORT and that all of them were started.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error
    if state.num_processes <= 1:
        return None
    return World(state.process_index, state.num_processes, max(0, state.local_process_index), ours)


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def _translate_slurm() -> None:
    """For `srun loftq quantize …` without a launcher, set a launcher's variables from those of Slurm's job step."""
    env = os.environ
    if _first(_SIZES, 0) or not env.get("SLURM_STEP_NUM_TASKS", "1").isdigit():
        return
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        env.setdefault("LOCAL_WORLD_SIZE", env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        # Jobs that share a machine have different ids.
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))

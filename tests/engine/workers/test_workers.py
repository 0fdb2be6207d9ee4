"""Several processes on one output: any number of them gives the same bytes, and none hangs if one dies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from support.interruptions import RECIPE, stop_after, tensors

import loftq_cli
from loftq_cli.api import plan as make_plan
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.engine.compute.stacks import Stack
from loftq_cli.engine.output.lock import Holder
from loftq_cli.engine.run import run_plan
from loftq_cli.engine.workers import session as session_module
from loftq_cli.engine.workers import supervisor as supervise
from loftq_cli.engine.workers.launcher import launched_rank
from loftq_cli.engine.workers.order import Order
from loftq_cli.engine.workers.session import Heartbeat, LivenessMonitor, Session, WorkerStatus, work_of
from loftq_cli.engine.workers.worker import carry_out
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.machine.devices import choose_devices
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit
from loftq_cli.progress import Reporter

LIMIT = 300  # seconds for a command that takes a few seconds on an idle machine


def command(source: Path, out: Path, *more: str) -> list[str]:
    words = [str(source), "-o", str(out), "--quiet", *more]
    for name, value in RECIPE.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return ["-m", "loftq_cli", "quantize", *words]


def statuses(out: Path) -> dict[str, dict]:
    found = {}
    for path in out.glob(".loftq/run-*/status.*"):
        try:
            found[path.name.removeprefix("status.")] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
    return found


def wait_for(condition: Callable[[], object]) -> object:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def claimed_units(session: Session, plan: Plan) -> Iterator[Unit]:
    for batch in session.claimed(plan):
        yield from batch.units


@pytest.fixture(scope="module")
def alone(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    return tensors(out)


@pytest.fixture(scope="module")
def slow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices that keep a worker busy for seconds when the SVD is exact."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=4, vocab_size=64
    )
    path = tmp_path_factory.mktemp("slow") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


SLOW = ["--svd", "exact", "--iters", "30", "--max-shard-size", "5GB"]


def test_two_workers_give_the_bytes_of_one_and_report_as_one(alone, random_llama: Path, tmp_path: Path) -> None:
    out, done, taken_up = tmp_path / "out", [], []

    class Watch(Reporter):
        def working(self, unit) -> None:
            assert unit.tensor not in done
            taken_up.append(unit.tensor)

        def done(self, unit, record) -> None:
            assert unit.tensor in taken_up
            done.append(unit.tensor)

    manifest = loftq_cli.quantize(random_llama, output=out, num_processes=2, reporter=Watch(), **RECIPE)
    assert tensors(out) == alone and loftq_cli.verify(out, source=random_llama).ok
    assert sorted(done) == sorted(record.tensor for record in (*manifest.matrices, *manifest.kept)) == sorted(taken_up)
    assert manifest.device == "2 × cpu" and not (out / ".loftq").exists()


def test_four_workers_finish_what_one_began(alone, random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(5, random_llama, out)
    taken_up = []

    class Watch(Reporter):
        def start(self, plan, finished) -> None:
            taken_up.append(len(finished))

    loftq_cli.quantize(random_llama, output=out, num_processes=4, reporter=Watch(), **RECIPE)
    assert taken_up[0] >= 5 and tensors(out) == alone


def test_a_killed_worker_fails_the_run_with_its_matrix_and_leaves_no_orphan(slow_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, *command(slow_llama, out, *SLOW, "--num-processes", "2")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: [s for name, s in statuses(out).items() if name == "1" and s["unit"]])
    pids = {name: status["pid"] for name, status in statuses(out).items()}
    at = statuses(out)["1"]["unit"]
    os.kill(pids["1"], signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=LIMIT)
    assert time.monotonic() - killed < 30 and process.returncode == ExitCode.INCOMPLETE, said
    assert f"worker 1 (process {pids['1']} on " in said and f"while it worked on {at}" in said
    assert "run the same command again" in said and "Traceback" not in said
    assert pids.keys() >= {"0", "1", "main"} and not any(psutil.pid_exists(pid) for pid in pids.values())
    assert [path.name for path in out.iterdir()] == [".loftq"]


def test_workers_end_with_a_killed_main_process(slow_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, *command(slow_llama, out, *SLOW, "--num-processes", "2")])
    wait_for(lambda: {name for name, s in statuses(out).items() if s["unit"]} >= {"0", "1"})
    pids = [status["pid"] for status in statuses(out).values()]
    process.kill()
    process.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_interrupt_ends_all_workers_with_130(slow_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, *command(slow_llama, out, *SLOW, "--num-processes", "2")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: [s for s in statuses(out).values() if s["unit"]])
    pids = [status["pid"] for status in statuses(out).values()]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == ExitCode.INTERRUPTED and "run the same command again to resume" in said
    assert not any(psutil.pid_exists(pid) for pid in pids) and not list((out / ".loftq").glob("lock.*"))


def test_what_a_worker_cannot_do_is_told_as_if_alone(random_llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(random_llama, tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for count in (1, 2):
        with pytest.raises(LoftqError, match=r"up_proj.weight in model.safetensors holds nan at \[3, 5\]") as caught:
            loftq_cli.quantize(source, output=tmp_path / str(count), num_processes=count, **RECIPE)
        assert caught.value.exit_code == ExitCode.FAILED


@pytest.mark.parametrize("launchers", [1, 2])
def test_ranks_of_launchers_share_a_directory(launchers: int, alone, random_llama: Path, tmp_path: Path) -> None:
    """One launcher with two ranks; and two launchers with one rank each, as on two machines."""
    out, port = tmp_path / "out", free_port()
    running = []
    for node in range(launchers):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(launchers), "--node_rank", str(node)]
        words += ["--nproc_per_node", str(2 // launchers), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        words += [word for word in command(random_llama, out) if word != "--quiet"]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=LIMIT) for process in running]
    assert [process.returncode for process in running] == [0] * launchers, said
    assert tensors(out) == alone and not (out / ".loftq").exists()
    assert sum(stdout.count("written to") for stdout, _ in said) == 1, "only the main process prints"
    assert all("LlamaForCausalLM" not in stderr for _, stderr in said[1:])


def test_ranks_fail_with_the_main_process(random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    words = [sys.executable, *command(random_llama, tmp_path / "out")]
    running = [
        subprocess.Popen(
            words, env={**os.environ, **env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=LIMIT)[1].decode() for process in running]
    assert [process.returncode for process in running] == [ExitCode.USAGE, ExitCode.USAGE], said
    assert "not loftq's" in said[0] and "loftq:" not in said[1]


def test_a_silent_worker_of_another_launcher_ends_the_run(random_llama: Path, tmp_path: Path, monkeypatch) -> None:
    """A rank that joined, claimed a unit and died."""
    plan, out = make_plan(random_llama, output=tmp_path / "out", **RECIPE), tmp_path / "out"
    monkeypatch.setattr(session_module, "SILENT_SECONDS", 0.2)

    def join(run_id: str) -> None:
        session = Session(out, run_id)
        (unit,) = next(session.claimed(plan)).units
        status = WorkerStatus(beat=5, host="node7", pid=4711, unit=unit.tensor)
        (session.path / "status.1").write_text(json.dumps(dataclasses.asdict(status)))

    with closing(open_checkpoint(random_llama)) as checkpoint, pytest.raises(LoftqError) as caught:
        run_plan(
            plan,
            checkpoint,
            device=torch.device("cpu"),
            reporter=Reporter(),
            team=supervise.Team([], join),
        )
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    assert "worker 1 (process 4711 on node7) has been silent" in str(caught.value)
    assert "while it worked on model.layers." in str(caught.value)
    loftq_cli.quantize(random_llama, output=out, **RECIPE)


def test_each_unit_is_claimed_once_largest_first_and_not_after_a_stop(random_llama: Path, tmp_path: Path) -> None:
    plan = make_plan(random_llama, output=tmp_path / "out", **RECIPE)
    (tmp_path / "out" / ".loftq").mkdir(parents=True)
    session = Session(tmp_path / "out", "a")
    session.begin(plan, [Stack.of(unit) for unit in plan.units])
    first, second = (claimed_units(Session(tmp_path / "out", "a"), plan) for _ in range(2))
    taken = [next(first), next(second), next(second), next(first)]
    assert [unit.matrix.weights for unit in taken] == [10240] * 4 and len({unit.tensor for unit in taken}) == 4
    taken += second
    assert list(first) == [] and {unit.tensor for unit in taken} == {unit.tensor for unit in plan.units}
    assert [work_of(unit) for unit in taken] == sorted(map(work_of, plan.units), reverse=True)
    session.begin(plan, [Stack.of(unit) for unit in plan.units])
    third = claimed_units(session, plan)
    next(third)
    session.stop()
    assert list(third) == []


def test_a_status_is_rewritten_in_place_and_its_silence_is_noticed(tmp_path: Path) -> None:
    session = Session(tmp_path, "a")
    session.path.mkdir(parents=True)
    heartbeat, liveness = Heartbeat(session, "3"), LivenessMonitor()
    heartbeat.update(unit="x.weight", error="e" * 9000)
    size = (session.path / "status.3").stat().st_size
    status = session.statuses()["3"]
    assert size == 4096 and status.unit == "x.weight" and status.error.startswith("eee") and status.pid == os.getpid()
    heartbeat.close()
    assert liveness.silent_seconds("3", status) == 0.0
    time.sleep(0.02)
    assert liveness.silent_seconds("3", status) >= 0.02 and liveness.silent_seconds("3", None) >= 0.02
    heartbeat.update(unit="y.weight")
    assert liveness.silent_seconds("3", session.statuses()["3"]) == 0.0


def test_damaged_statuses_and_work_lists_are_named_with_their_field(tmp_path: Path) -> None:
    session = Session(tmp_path, "a")
    session.path.mkdir(parents=True)
    (session.path / "status.1").write_text('{"beat": 3')
    assert session.statuses() == {}, "it is being written"
    for content, said in {
        '{"beat": "3"}': "beat must be an integer, not '3'",
        '{"colour": 3}': "colour is not a known field",
        '{"exit_code": 77}': "exit_code must be one of 0, 1, 2, 3, 4 or 130, not 77",
        '{"started": NaN}': "started must be a finite number, not nan",
    }.items():
        (session.path / "status.1").write_text(content)
        with pytest.raises(LoftqError) as caught:
            session.statuses()
        assert f"{session.path / 'status.1'} is damaged ({said}): make sure that all workers" in str(caught.value)
        assert caught.value.exit_code == ExitCode.INCOMPLETE
    (session.path / "units").write_text('{"fingerprint": "f", "units": [[0, -1]], "finished": [], "nonfinite": {}}')
    with pytest.raises(LoftqError, match=r"units is damaged \(units\[0\]\[1\] must be at least 0, not -1\)"):
        session.work_list()


@pytest.mark.parametrize("stack", [[10**9], [], [0, 1], [1, 0, 10**9]], ids=["beyond", "empty", "unlike", "both"])
def test_stacks_that_the_plan_does_not_have_are_refused(tmp_path: Path, random_llama: Path, stack: list[int]) -> None:
    plan = make_plan(random_llama, output=tmp_path / "out", **RECIPE)
    assert plan.units[0].matrix is None or plan.units[1].matrix is None or plan.units[0].matrix != plan.units[1].matrix
    session = Session(tmp_path, "a")
    session.path.mkdir(parents=True)
    content = {"fingerprint": plan.fingerprint, "units": [[0], stack], "finished": [], "nonfinite": {}}
    (session.path / "units").write_text(json.dumps(content))
    with pytest.raises(LoftqError, match=r"units is damaged \(units\[1\] is not a stack of this conversion's units\)"):
        session.stacks(plan)


def test_orders_are_checked() -> None:
    order = Order({"model": "m"}, "out", False, 1, "cpu", None, 10**9, "run")
    assert Order.from_json(order.to_json()) == order
    for fields, said in (({"rank": -1}, "rank must be at least 0"), ({"more": 1}, "more is not a known field")):
        with pytest.raises(LoftqError, match=rf"the order on standard input is damaged \({said}"):
            Order.from_json(json.dumps({**json.loads(order.to_json()), **fields}))
    words = [sys.executable, "-m", "loftq_cli.engine.workers.worker"]
    done = subprocess.run(words, input='{"rank": "x"}\n', capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == ExitCode.FAILED and len(done.stderr.strip().splitlines()) == 1
    assert "the order on standard input is damaged (recipe is missing)" in done.stderr


def test_a_dead_process_of_this_machine_is_seen_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    status = WorkerStatus(**dataclasses.asdict(dataclasses.replace(Holder.me(), pid=process.pid, started=started)))
    assert LivenessMonitor().why_dead("1", status) is None
    process.kill()
    process.wait()
    assert LivenessMonitor().why_dead("1", status) == "has died"


def test_devices(monkeypatch) -> None:
    assert [str(device) for device in choose_devices("cpu", 3)] == ["cpu"] * 3
    assert len(choose_devices("cpu", None)) == 1
    with pytest.raises(UsageError, match="--num-processes cannot be 0"):
        choose_devices("cpu", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in choose_devices("auto", None)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [str(device) for device in choose_devices("cuda", 4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert [str(device) for device in choose_devices("cuda:1", None)] == ["cuda:1"]


def test_slurm_steps_are_worlds_and_batch_scripts_are_not(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launched_rank() == 0 and "WORLD_SIZE" not in os.environ
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.7")
    assert launched_rank() == 3 and os.environ["WORLD_SIZE"] == "4" and os.environ["LOCAL_RANK"] == "1"
    assert os.environ["MASTER_ADDR"] == "10.0.0.7"


def test_a_worker_writes_nothing_where_no_run_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "none"):
        order = Order({"model": "m"}, str(output), False, 1, "cpu", None, None, "x")
        assert carry_out(order) == ExitCode.INCOMPLETE
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"

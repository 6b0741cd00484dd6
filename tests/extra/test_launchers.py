"""A sweep on each of Hydra's launchers, started for real: all jobs come to their end, also when the process or the
machine of one is killed in the middle; a finished sweep is not repeated.

Slurm's part takes Debian's slurmctld, slurmd, slurm-client and munge, and root: a cluster of one machine is started.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runtime.artifact import read_manifest
from tests.checkpoints import GOLDEN, ROOT

LENGTHS = (64, 96, 128)
SLURM = ("munged", "slurmctld", "slurmd", "sbatch")


def start(folder: Path, *launcher: str, **env: str) -> subprocess.Popen[str]:
    """Three jobs. The command's folder is where artifacts go."""
    jobs = [f"export.max_seq_len={','.join(map(str, LENGTHS))}", "recipe=fp32_xnnpack", "task=none"]
    paths = [f"checkpoint={GOLDEN / 'gqa2'}", f"cache={folder / 'cache'}"]
    command = [sys.executable, "-m", "pipeline", "run", "-m", *launcher, *jobs, *paths]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)  # type: ignore[call-overload]


def first_at_work(folder: Path, sweep: subprocess.Popen[str]) -> int:
    """The process of a job that is in the middle."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and sweep.poll() is None:
        for file in (folder / "artifacts" / ".sweep").glob("*/*.json"):
            record = json.loads(file.read_text())
            half = Path(folder, record["output"]).with_name(f".{Path(record['output']).name}.partial")
            if record["code"] is None and half.is_dir():
                assert record["process"] != sweep.pid
                return int(record["process"])
        time.sleep(0.02)
    raise AssertionError(sweep.communicate())


def all_done(folder: Path, sweep: subprocess.Popen[str], result: str) -> str:
    said, errors = sweep.communicate(timeout=240)
    assert sweep.returncode == 0, said + errors
    assert "Traceback" not in errors
    for length in LENGTHS:
        artifact = folder / "artifacts" / f"gqa2-fp32_xnnpack-{length}"
        assert read_manifest(artifact)["export"]["max_seq_len"] == length
    assert result in said
    artifacts = {path.name for path in (folder / "artifacts").iterdir()}
    assert artifacts == {".sweep", *(f"gqa2-fp32_xnnpack-{length}" for length in LENGTHS)}
    return errors


def killed_in_the_middle(folder: Path, *launcher: str, **env: str) -> None:
    sweep = start(folder, *launcher, **env)
    os.kill(first_at_work(folder, sweep), signal.SIGKILL)
    assert "are begun again" in all_done(folder, sweep, "3 done, 0 done before, 0 failed")
    all_done(folder, start(folder, *launcher, **env), "0 done, 3 done before, 0 failed")


def test_joblib(tmp_path: Path) -> None:
    killed_in_the_middle(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def test_submitit_here(tmp_path: Path) -> None:
    killed_in_the_middle(tmp_path, "hydra/launcher=submitit_local")


class Cluster:
    """Slurm's daemons by name, of a cluster of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.env = folder, {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}.out").open("a")
        environment = os.environ | self.env
        self.processes[name] = subprocess.Popen([name, *arguments], env=environment, stdout=log, stderr=log)
        time.sleep(1)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Cluster]:
    if missing := [name for name in SLURM if shutil.which(name) is None]:
        pytest.fail(f"apt-get install -y slurmctld slurmd slurm-client munge: there is no {', '.join(missing)}")
    folder, name = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    folder.mkdir()
    (folder / "slurm.conf").write_text(f"""
ClusterName=tests
SlurmctldHost={name}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
MpiDefault=none
SlurmctldPort=16827
SlurmdPort=16828
NodeName={name} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    for inner in ("state", "spool"):
        (folder / inner).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    keys = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    files = [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    cluster = Cluster(folder)
    try:
        cluster.start("munged", "-F", "--force", *keys, *files)
        cluster.start("slurmctld", "-D")
        cluster.start("slurmd", "-D")
        yield cluster
    finally:
        for process in reversed(cluster.processes.values()):
            process.terminate()
            process.wait(30)


def test_a_slurm_node_dies(tmp_path: Path, slurm: Cluster) -> None:
    """It comes back without its jobs: Slurm gives them to it again."""
    folder = tmp_path / "work"
    folder.mkdir()
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=1"]
    sweep = start(folder, *launcher, **slurm.env)
    first_at_work(folder, sweep)
    slurm.processes["slurmd"].kill()
    slurm.processes["slurmd"].wait()
    for daemon in [one for one in psutil.process_iter(["name"]) if one.info["name"] == "slurmstepd"]:
        for process in (*daemon.children(recursive=True), daemon):
            process.kill()
    seen = ["sinfo", "--noheader", "--format=%T"]
    while "down" not in subprocess.run(seen, env=os.environ | slurm.env, capture_output=True, text=True).stdout:
        time.sleep(1)
    slurm.start("slurmd", "-D")
    all_done(folder, sweep, "3 done, 0 done before, 0 failed")
    all_done(folder, start(folder, *launcher, **slurm.env), "0 done, 3 done before, 0 failed")


def test_a_ray_cluster_loses_a_node(tmp_path: Path) -> None:
    """Two nodes; the one that a job is on is killed with all of its processes. Ray gives its job to the other."""
    from ray.cluster_utils import Cluster as Ray

    os.environ["PYTHONPATH"] = str(ROOT)  # that jobs import, as on a machine where it is installed
    cluster = Ray(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=2**27)
        address = f"hydra.launcher.ray.init.address={cluster.address}"
        launcher = ["hydra/launcher=ray", address, "+hydra.launcher.ray.init.object_store_memory=null"]
        folder = tmp_path / "work"
        folder.mkdir()
        sweep = start(folder, *launcher)
        other = cluster.worker_nodes.copy().pop()
        raylet = other.all_processes["raylet"][0].process.pid
        deadline, job = time.monotonic() + 120, 0
        while time.monotonic() < deadline and psutil.Process(job or 1).ppid() != raylet:
            job = at_work_under(folder, raylet) or job
            time.sleep(0.02)
        for process in (raylet, job):
            os.kill(process, signal.SIGKILL)
        all_done(folder, sweep, "3 done, 0 done before, 0 failed")
        all_done(folder, start(folder, *launcher), "0 done, 3 done before, 0 failed")
    finally:
        cluster.shutdown()


def at_work_under(folder: Path, raylet: int) -> int | None:
    for file in (folder / "artifacts" / ".sweep").glob("*/*.json"):
        record = json.loads(file.read_text())
        half = Path(folder, record["output"]).with_name(f".{Path(record['output']).name}.partial")
        process = int(record["process"])
        if record["code"] is None and half.is_dir() and psutil.Process(process).ppid() == raylet:
            return process
    return None

"""Slurm on one node, as a peer: slurmctld, slurmd and munge in namespaces of their own.

    python -m bench.slurm DIRECTORY CPUS        (inside the namespaces that `Slurm` makes)

reads numbers of jobs, one a line, runs that many no-op jobs as an array, and answers with the
seconds from their submission to the end of the last. Everything it writes is in the directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

__all__ = ["Slurm", "install_slurm"]

_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
_READY_S = 60.0
_ROUND_S = 300.0
_DONE = re.compile(r"\[([0-9T:.-]+)\] _job_complete: JobId=\S+ done")
_CONFIGURATION = """
ClusterName=bench
SlurmctldHost=bench
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
SlurmUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1000,default_queue_depth=1000
JobAcctGatherType=jobacct_gather/none
MaxArraySize=100001
MaxJobCount=200000
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=bench CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=bench Default=YES MaxTime=INFINITE State=UP
"""


def install_slurm() -> str:
    """Install Slurm with apt-get where it is absent; return why not, or nothing."""
    if all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        return ""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *_PACKAGES]
    for argv in (["apt-get", "update", "-q"], command):
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    return f"Slurm could not be installed: {done.stderr.strip()[-200:]}" if done.returncode else ""


class Slurm:
    """The starter's side: a context manager around the node."""

    def __init__(self, directory: Path, cpus: int) -> None:
        directory.mkdir()
        self._errors = os.open(directory / "errors", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._directory = directory
        self._process = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"),
                *("--kill-child", sys.executable, "-m", "bench.slurm", str(directory), str(cpus)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, count: int) -> float:
        """Run so many no-op jobs; return the seconds that it took."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            words = (self._directory / "errors").read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"slurm ended: {words}")
        return float(line)

    def __enter__(self) -> Slurm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()  # and with the first process of its namespace, all of them
        self._process.wait()
        os.close(self._errors)


# ---- inside -------------------------------------------------------------------------------


def _run(*argv: str, timeout: float = 30.0) -> str:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"{argv[0]} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return done.stdout


def _prepare(directory: Path, cpus: int) -> None:
    """Set up names, addresses and the daemons."""
    _run("hostname", "bench")
    _run("ip", "link", "set", "lo", "up")
    # Slurm resolves its own name only where there is an address beside the loopback's.
    for line in ("link add b0 type bridge", "addr add 10.99.0.1/24 dev b0", "link set b0 up"):
        _run("ip", *line.split())
    hosts = directory / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.99.0.1 bench\n")
    _run("mount", "--bind", str(hosts), "/etc/hosts")
    for name in ("state", "spool"):
        (directory / name).mkdir()
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = {"key": "munge.key", "socket": "munge.socket", "log": "munged.log"}
    options = [f"--{name}-file={directory}/{files[name]}" for name in ("key", "log")]
    options += [f"--socket={directory}/{files['socket']}", f"--pid-file={directory}/munged.pid"]
    _run("munged", "--force", f"--seed-file={directory}/munged.seed", *options)
    configuration = directory / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(directory=directory, cpus=cpus))
    os.environ["SLURM_CONF"] = str(configuration)
    _run("slurmctld", "-c")
    _run("slurmd", "-N", "bench")
    deadline = time.monotonic() + _READY_S
    while "idle" not in _run("sinfo", "-h", "-o", "%T"):
        if time.monotonic() > deadline:
            raise RuntimeError("the node has not become idle")
        time.sleep(0.2)


def _round(directory: Path, count: int) -> float:
    """Return the seconds between the submission of an array and the end of its last job, as
    slurmctld logs it."""
    log = directory / "slurmctld.log"
    before = log.stat().st_size
    began = time.time()
    _run("sbatch", f"--array=1-{count}", "-n1", "--output=/dev/null", "--wrap=true")
    deadline = time.monotonic() + _ROUND_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        with open(log) as file:
            file.seek(before)
            ended = _DONE.findall(file.read())
        if len(ended) >= count:
            return datetime.fromisoformat(ended[-1]).timestamp() - began
    raise RuntimeError(f"{len(ended)} of {count} jobs had ended after {_ROUND_S:g} s")


def main() -> None:
    directory, cpus = Path(sys.argv[1]), int(sys.argv[2])
    _prepare(directory, cpus)
    for line in sys.stdin:
        print(_round(directory, int(line)), flush=True)


if __name__ == "__main__":
    main()

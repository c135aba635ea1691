"""A real Slurm of a few nodes on this one machine: slurmctld, a slurmd a node, munge; no systemd. Needs root.

Each node has a network namespace of its own where the kernel lets us make one: an address on a bridge, a loopback that
leads nowhere else, a host name that nobody resolves. Elsewhere all nodes are this host.

    python tests/slurm/cluster.py up FOLDER [NODES]      then: export SLURM_CONF=FOLDER/slurm.conf
    python tests/slurm/cluster.py down FOLDER
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
_WAIT_S = 30.0
_CONF = """
ClusterName=rloop
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/public/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,defer_batch
PriorityType=priority/basic
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
InactiveLimit=0
KillWait=5
MinJobAge=600
SlurmctldTimeout=10
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=5
MailProg=/bin/true
PropagateResourceLimits=NONE
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE DefaultTime=30 State=UP OverSubscribe=NO
"""


def install() -> None:
    """Debian's packages, where they are missing. Raises CalledProcessError."""
    if all(shutil.which(program, path=_path()) for program in PROGRAMS):
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet, timeout=300)
    command = ["apt-get", "install", "-qq", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, check=True, env=quiet, timeout=600, stdout=subprocess.DEVNULL)


class Cluster:
    def __init__(self, folder: Path, nodes: int, cpus: int = 8) -> None:
        self.folder, self.nodes, self.cpus = folder, nodes, cpus
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.apart = False  # each node has a network of its own
        self.bridge = "rl" + blake2b(str(folder).encode(), digest_size=3).hexdigest()  # of this cluster alone
        self.subnet = ""

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def up(self) -> None:
        """Start it, and wait until every node is idle. Raises TimeoutError with the logs."""
        for name in ("state", "spool", "log", "run", "munge/public"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in self.names:
            (self.folder / "spool" / name).mkdir(exist_ok=True)
        self.apart = self._networks()
        self._munge()
        port = _free_ports(self.nodes + 1)
        address = [f"{self.subnet}.{n}" if self.apart else "127.0.0.1" for n in range(1, self.nodes + 1)]
        host = socket.gethostname().split(".")[0]
        conf = _CONF.format(
            host=host,
            controller=f"{self.subnet}.254" if self.apart else "127.0.0.1",
            port=port,
            folder=self.folder,
            nodes=self.nodes,
        )
        for number, name in enumerate(self.names):
            # NodeHostname is what slurmd -N goes by; the node's own host name is set beside it
            conf += (
                f"NodeName={name} NodeHostname={name if self.apart else host} NodeAddr={address[number]} "
                f"Port={port + 1 + number} CPUs={self.cpus} RealMemory=4000 State=UNKNOWN\n"
            )
        (self.folder / "slurm.conf").write_text(conf)
        self.run("slurmctld", "-c")
        for name in self.names:
            self.start_node(name)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Raises TimeoutError with the logs."""
        deadline = time.monotonic() + _WAIT_S
        while self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split().count("idle") < self.nodes:
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text()[-2000:] for log in (self.folder / "log").glob("*.log"))
                raise TimeoutError(
                    f"the nodes were not idle within {_WAIT_S:g} s:\n{self.run('sinfo', '-N', '-l')}\n{logs}"
                )
            time.sleep(0.2)

    def down(self) -> None:
        """End every job and daemon of it, and take its network away."""
        self.run("scancel", "--full", "-u", "root", check=False)
        deadline = time.monotonic() + 15
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for file in (*(self.folder / "run").glob("*.pid"), self.folder / "munge/public/pid"):
            self._end(file)
        self._remove_networks()

    def start_node(self, name: str, ailment: str = "true") -> None:
        """ailment: a command that does something to the mounts that the node alone sees."""
        where = ["nsenter", f"--net=/run/netns/{self.bridge}-{name}"] if self.apart else []
        rename = f"hostname {name}" if self.apart else "true"
        start = f"{rename} && {ailment} && exec slurmd -N {name}"
        self.run(*where, "unshare", "--uts", "--mount", "bash", "-c", start)

    def kill_node(self, name: str) -> None:
        """The node dies: its slurmd, its jobs' shepherds and all they have started."""
        daemon = int((self.folder / "run" / f"slurmd-{name}.pid").read_text())
        for pid in (daemon, *self.processes_of(name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes_of(self, name: str) -> list[int]:
        """What runs on a node: all in its network, else all that has Slurm's name for it in its environment."""
        if self.apart:
            return [int(pid) for pid in self.run("ip", "netns", "pids", f"{self.bridge}-{name}").split()]
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (place / "environ").read_bytes().split(b"\0")
                here = {f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
                if here <= set(words):
                    found.append(int(place.name))
        return found

    def run(self, *command: str, check: bool = True, timeout: float = 30.0) -> str:
        """Run a command as a user of the cluster would; returns its output."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=timeout)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def _munge(self) -> None:
        folder = self.folder / "munge"
        folder.chmod(0o711)
        key = folder / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(secrets.token_bytes(1024))
        files = [f"--{what}-file={folder / name}" for what, name in (("key", "key"), ("log", "log"), ("seed", "seed"))]
        public = folder / "public"
        self.run("munged", "--force", f"--socket={public}/socket", f"--pid-file={public}/pid", *files)

    def _networks(self) -> bool:
        """A bridge, and a network namespace of each node on it. False where this kernel allows none."""
        if shutil.which("ip") is None:
            return False
        taken = self.run("ip", "-4", "addr")
        self.subnet = next(net for number in range(256) if f"{(net := f'10.213.{number}')}." not in taken)
        steps = [
            ["link", "add", self.bridge, "type", "bridge"],
            ["addr", "add", f"{self.subnet}.254/24", "dev", self.bridge],
            ["link", "set", self.bridge, "up"],
        ]
        for number, name in enumerate(self.names, 1):
            space = f"{self.bridge}-{name}"
            steps += [
                ["netns", "add", space],
                ["link", "add", f"{self.bridge}-{name}", "type", "veth", "peer", "name", "net0", "netns", space],
                ["link", "set", f"{self.bridge}-{name}", "master", self.bridge, "up"],
                ["-n", space, "addr", "add", f"{self.subnet}.{number}/24", "dev", "net0"],
                ["-n", space, "link", "set", "net0", "up"],
                ["-n", space, "link", "set", "lo", "up"],
            ]
        return all(subprocess.run(["ip", *step], capture_output=True).returncode == 0 for step in steps)

    def _remove_networks(self) -> None:
        if shutil.which("ip") is not None:
            for name in self.names:
                subprocess.run(["ip", "netns", "del", f"{self.bridge}-{name}"], capture_output=True)
            subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def _end(self, pid_file: Path) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = int(pid_file.read_text())
            os.kill(pid, signal.SIGTERM)
            for _ in range(50):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        first = 15000 + secrets.randbelow(5000)  # another cluster may start at the same moment
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("0.0.0.0", port))
            return first


if __name__ == "__main__":
    install()
    cluster = Cluster(Path(sys.argv[2]).absolute(), int(sys.argv[3]) if len(sys.argv) > 3 else 4)
    cluster.up() if sys.argv[1] == "up" else cluster.down()

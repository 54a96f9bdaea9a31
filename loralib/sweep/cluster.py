"""The Ray cluster of a sweep: starts or joins it, divides its resources, and notices when it is gone."""

import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from loralib.errors import InputError, RunError
from loralib.sweep.guard import interrupt_on_signals
from loralib.sweep.plan import ROOT

TOKEN = secrets.token_hex(32)  # one for the whole process, because Ray's client keeps the first one that it sees


class ClusterLost(RunError):
    """The Ray cluster is gone. No run is to blame, and the same command goes on later."""


class Cluster:
    """Ray, started inside this process or joined at an address.

    Ray listens on all interfaces even if it is given an address, and anyone who reaches its ports may run commands. So
    a cluster that is started here asks for a token that only this process and its workers know, and its files are in a
    folder that only its owner can read.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self.folder: Path | None = None
        self.ray: Any = None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    def start(self) -> Any:
        """Start or join the cluster, and return the module `ray`.

        Raises:
            InputError: Ray is not installed, or cannot be started or reached.
        """
        if not self.address:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = TOKEN
        try:
            import ray
        except ImportError as error:
            raise InputError(
                f"sweeps run on Ray, which is not installed: pip install -e '{ROOT}[sweep]' (a single run needs no "
                "Ray: bash scripts/mrpc.sh lora)."
            ) from error
        self._check_address()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address:
                ray.init(address=self.address, **quiet)
            else:
                # Ray lets everybody read its folder, so it is put inside of this one. The path is short because
                # names of sockets may have only about a hundred letters.
                base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 30 else "/tmp"
                self.folder = Path(tempfile.mkdtemp(prefix="sweep-", dir=base))
                ray.init(address="local", include_dashboard=False, _temp_dir=str(self.folder / "ray"), **quiet)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            self.stop()
            what, way = "start on this machine", "free memory and disk in the temporary folder, or give --address"
            if self.address:
                what, way = f"reach {self.address}", "check the address, and RAY_AUTH_TOKEN if that cluster needs one"
            raise InputError(f"Ray could not {what} ({' '.join(str(error).split())[:300]}): {way}.") from error
        interrupt_on_signals()  # Ray has replaced the handler of SIGTERM
        self.ray = ray
        return ray

    def _check_address(self) -> None:
        """Refuse an address at which nothing answers; Ray itself would try for minutes."""
        host, _, port = (self.address or "").removeprefix("ray://").rpartition(":")
        if port.isdigit():
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError as error:
                raise InputError(
                    f"nothing answers at --address {self.address} ({error}): start Ray there, or leave it out."
                ) from error

    def alive(self) -> bool:
        """Whether the control service answers and a machine is left.

        Ray ends the driver about a minute after its control service is gone; this check comes earlier.
        """
        try:
            gcs = self.ray.get_runtime_context().gcs_address
            host, _, port = gcs.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
            return any(node["Alive"] for node in self.ray.nodes())
        except Exception:  # Ray raises many kinds of errors if a cluster is gone
            return False

    def stop(self) -> None:
        """Leave the cluster; if it was started here, end it and remove its files."""
        if self.ray is not None:
            self.ray.shutdown()
            self.ray = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def resources(ray: Any, gpus: float | None, cpus: float | None) -> tuple[float, float, int]:
    """GPUs of a run, CPUs of a run, and the number of runs at a time.

    Raises:
        InputError: no machine of the cluster has so many GPUs or CPUs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("GPU", "CPU")}
    gpus = (1 if most["GPU"] else 0) if gpus is None else gpus
    cpus = min(4, most["CPU"]) if cpus is None else cpus
    for flag, value, kind in (("gpus_per_run", gpus, "GPU"), ("cpus_per_run", cpus, "CPU")):
        if value < 0 or (value > 1 and value != int(value)):
            raise InputError(f"{flag} is {value}, it must be a whole number, or a share below 1 of one {kind}.")
        if value > most[kind]:
            way = "give --gpus_per_run 0 to run on CPUs" if kind == "GPU" and not most[kind] else f"lower --{flag}"
            raise InputError(f"{flag} is {value:g} and the largest machine has {most[kind]:g} {kind}s: {way}.")
    if not cpus:
        raise InputError("cpus_per_run is 0, it must be above 0: every run needs a core or a share of one.")
    per_node = [min(int(n.get(k, 0) / v + 1e-9) for k, v in (("GPU", gpus), ("CPU", cpus)) if v) for n in nodes]
    return gpus, cpus, max(1, sum(per_node))

"""Workers as Ray actors: more than one machine. evalkit, the same version, is installed on every node."""

import contextlib
import itertools
import logging
import math
import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evalkit.engines.pool import PATIENCE_S, WorkerDied, unpack
from evalkit.records import Reply, Request

_KNOWN = ("num_cpus", "num_gpus", "memory")

logger = logging.getLogger("evalkit")


def connect(address: str) -> Callable[[], None]:
    """Join the cluster at ``address`` ("auto": the one this machine belongs to) -> how to leave it.

    A program that has joined one already stays in it. ValueError: there is no Ray, or no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The driver asks for no GPU, and must still see its own; Ray warns until this is decided.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install 'evalkit[ray]' on every node") from error
    if ray.is_initialized():
        return lambda: None
    # Ray prints what happens to nodes on standard output, which is the command's own.
    aside = contextlib.ExitStack()
    aside.enter_context(contextlib.redirect_stdout(sys.stderr))
    aside.callback(ray.shutdown)
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "/" not in address:  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
        ray.init(address=address, log_to_driver=bool(os.environ.get("EVALKIT_DEBUG")), logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        aside.close()
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"no Ray cluster at {address!r} ({reason}); start one with `ray start --head`, and with "
            f"`ray start --address HEAD:6379` on every other node"
        ) from error
    return aside.close


def read_resources(text: str) -> dict[str, float]:
    """ "num_gpus=1,num_cpus=2" (any other name is a custom resource) -> amounts of one actor."""
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            equals = ""
        if not equals or not name.strip() or not 0 <= found[name.strip()] < math.inf:
            raise ValueError(f"--ray-resources: {part!r} is not NAME=AMOUNT, as in num_gpus=1,num_cpus=2")
        if name.strip() in ("CPU", "GPU"):
            raise ValueError(f"--ray-resources: {part!r} is called num_{name.strip().lower()}s={amount.strip()} here")
    return found


def room(resources: Mapping[str, float]) -> tuple[dict[str, float], int]:
    """(resources of one actor, actors that the cluster has room for). None asked for: a GPU each, or where there are
    none the processor of the smallest node. ValueError: no node has them."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = dict(resources)
    if not each and any(node.get("GPU") for node in nodes):
        each = {"num_gpus": 1.0}
    elif not each:
        each = {"num_cpus": min((node["CPU"] for node in nodes if node.get("CPU")), default=1.0)}
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    wanted = {names.get(name, name): amount for name, amount in each.items() if amount}
    if not wanted:
        raise ValueError("--ray-resources must ask for something, e.g. num_cpus=1")
    # A little over, so that 1 / 0.1 is 10.
    fits = [min(int(node.get(name, 0) / amount + 1e-6) for name, amount in wanted.items()) for node in nodes]
    if not sum(fits):
        shown = ["{" + ", ".join(f"{n} {v:g}" for n, v in sorted(r.items()) if "node:" not in n) + "}" for r in nodes]
        asked = ", ".join(f"{name}={amount:g}" for name, amount in each.items())
        raise ValueError(f"no node of the Ray cluster has {asked}: there are {', '.join(shown)}; see --ray-resources")
    return each, sum(fits)


class RayWorker:
    """One actor. Ray starts it as soon as a node has room, and that may be a new node."""

    def __init__(self, number: int, opener: Callable[[], Any], resources: Mapping[str, float]) -> None:
        import ray

        known = {name: amount for name, amount in resources.items() if name in _KNOWN}
        custom = {name: amount for name, amount in resources.items() if name not in _KNOWN}
        options = {**known, "resources": custom, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        self.name = f"worker {number}"
        self._resources = resources
        self._opener = pickle.dumps(opener)
        self._actor = ray.remote(_actor_class()).options(**options).remote()
        self._busy = self._lost = False

    def open(self) -> Any:
        from evalkit import __version__

        self.name += f" on node {self._placed()}"
        try:
            return unpack(self._get(self._actor.open.remote(__version__, self._opener)), self.name)
        except ValueError as error:
            raise ValueError(f"{error} (with --ray, models and packages must be on every node)") from error

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        replies: list[Reply] = unpack(self._get(self._actor.answer.remote(requests)), self.name)
        return replies

    def _placed(self) -> str:
        """The actor's node, as soon as one has room. ValueError: none is left that could ever have."""
        import ray

        reference = self._actor.where.remote()
        self._busy = True
        for waited in itertools.count(1):
            if ray.wait([reference], timeout=PATIENCE_S)[0]:
                break
            room(self._resources)
            if waited % 6 == 0:
                logger.warning("%s has waited %g s for room on the Ray cluster", self.name, waited * PATIENCE_S)
        return str(self._get(reference))

    def _get(self, reference: Any) -> Any:
        import ray

        self._busy = True
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            self._lost = True
            # The last line of a Ray error says what happened; the first ones are identifiers.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise WorkerDied(f"{self.name} was lost: {lines[-1] if lines else type(error).__name__}") from error
        finally:
            self._busy = False

    def stop(self, force: bool) -> None:
        """An idle one is left to ``close``, which lets it end what its engine began."""
        import ray

        if (force or self._busy) and ray.is_initialized():
            ray.kill(self._actor)

    def close(self) -> None:
        import ray

        if not self._lost:
            with contextlib.suppress(ray.exceptions.RayError):  # it is dead already, or `stop` ends it
                ray.get(self._actor.close.remote(), timeout=PATIENCE_S)
        self.stop(force=True)


def _actor_class() -> type:
    # Made in a function, so that Ray sends the class itself: a node without evalkit must be able to say so.
    class EvalkitWorker:
        def where(self) -> str:
            import ray

            return str(ray.util.get_node_ip_address())

        def open(self, version: str, opener: bytes) -> Any:
            import os
            import pickle

            os.environ.setdefault("TQDM_DISABLE", "1")
            try:
                import evalkit
            except ImportError as error:
                return "refused", f"evalkit can't be imported there ({error}); install evalkit {version}"
            if evalkit.__version__ != version:
                return "refused", f"evalkit is {evalkit.__version__} there and {version} here; install the same one"
            from evalkit.engines.pool import Host

            self.host = Host(pickle.loads(opener))
            return self.host.open()

        def answer(self, requests: Any) -> Any:
            return self.host.answer(requests)

        def close(self) -> None:
            if hasattr(self, "host"):
                self.host.close()

    return EvalkitWorker

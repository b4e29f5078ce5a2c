"""Serve networks to many callers, each with a deadline."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from impatient.errors import ServingError
from impatient.verbs.notes import log
from impatient.verbs.options import OFF, Count, Milliseconds, Positive, RunPath, Trust, VerbOptions
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from impatient.anytime import Network
    from impatient.serving.base import BaseService, Limits
    from impatient.serving.fleet import FleetService
    from impatient.serving.ray_serve import RayFleet
    from impatient.serving.rpc import Rpc
    from impatient.serving.service import Hosted
    from impatient.serving.tensors import InputSpec
    from impatient.verbs.network_spec import NetworkSpec

# names of the protocol for torch's names
DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
TOKEN = "IMPATIENT_TOKEN"  # noqa: S105  the name of a variable


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(VerbOptions):
    """Answer requests over HTTP and gRPC, each by its deadline.

    Attributes:
        directories: Run directories; a model is called as its directory is.
        host: Address to listen at, for the Open Inference Protocol v2; only this machine can reach
            the default. If the variable IMPATIENT_TOKEN is set, requests must carry it.
        port: Port to listen at; 0 takes a free one.
        grpc_port: Port to listen at for the same protocol over gRPC; 0 takes a free one. Without it
            there is no gRPC.
        default_s: Time for an answer where a request says nothing, in ms.
        most_s: The longest time that a request may have, in ms.
        waiting: Most requests without a reply; more are refused.
        max_batch: Most samples in one batch.
        drain_s: How long open requests are waited for at the end, in ms.
        ray: Have replicas on the machines of a Ray cluster answer, of which all must see the
            directories. SIGHUP has them load these again, one after the other.
        replicas: With `ray`, how many there are.
        most_replicas: With `ray`, how many there may be under load. Without it, no more.
    """

    directories: Annotated[Positional[tuple[RunPath, ...]], arg(metavar="DIR..."), OFF]
    host: str = "127.0.0.1"
    port: Count = 8000
    grpc_port: Annotated[Count | None, arg(name="grpc-port"), OFF] = None
    default_s: Annotated[Milliseconds, arg(name="default-ms")] = 0.1
    most_s: Annotated[Milliseconds, arg(name="most-ms")] = 10.0
    waiting: Positive = 256
    max_batch: Positive = 8
    drain_s: Annotated[Milliseconds, arg(name="drain-ms")] = 5.0
    ray: bool = False
    replicas: Positive = 1
    most_replicas: Annotated[Positive | None, arg(name="most-replicas"), OFF] = None
    trust: Trust = ()


def check_installed() -> None:
    """Check that what serving needs is installed.

    Raises:
        ServingError: if it is not.
    """
    if importlib.util.find_spec("uvicorn") is None:
        raise ServingError(
            "serving needs uvicorn, which is not installed; run pip install 'impatient[serve]'."
        )


def serve(options: ServeOptions, begun: Callable[[str], object] = lambda _address: None) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what is open.

    Args:
        options: the options.
        begun: what is called with the address as soon as callers can connect.
    """
    check_installed()
    from impatient.serving.connections import bound_socket

    if not options.directories:
        raise ServingError("no run directories; expected at least one to serve.")
    token = os.environ.get(TOKEN, "")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ServingError(
            f"the variable {TOKEN} holds spaces or characters that no header can carry; set it to "
            "letters, digits and signs of ASCII."
        )
    if not token and not _is_loopback(options.host):
        raise ServingError(
            f"{options.host} can be reached from other machines, and no token is set; set the "
            f"variable {TOKEN} to a secret, or serve at 127.0.0.1 behind a proxy."
        )
    if not options.ray and (options.replicas > 1 or options.most_replicas is not None):
        raise ServingError(
            "--replicas and --most-replicas are for the machines of a Ray cluster; add --ray."
        )
    _end_at_sigterm()
    with bound_socket(options.host, options.port) as listener:
        _serve_at(listener, options, begun)


def _serve_at(
    listener: socket.socket, options: ServeOptions, begun: Callable[[str], object]
) -> None:
    from impatient.serving.app import App
    from impatient.serving.base import Limits
    from impatient.serving.connections import web_server
    from impatient.serving.service import Service

    host, port = listener.getsockname()[:2]
    limits = Limits(
        default_s=options.default_s or 0.1,
        most_s=options.most_s or 10.0,
        waiting=options.waiting,
    )
    service: BaseService
    if options.ray:
        service = ray_service(options, limits, port)
    else:
        service = Service([hosted(path, options) for path in options.directories], limits)
    drain_s = options.drain_s or 5.0
    token = os.environ.get(TOKEN, "")
    sides = [] if options.grpc_port is None else [rpc_side(service, options, token)]
    app = App(service, sides=sides, token=token, drain_s=drain_s)
    app.bodies.reader.start()
    server = web_server(app, most_connections=4 * options.waiting, drain_s=drain_s)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}"
    listener.listen()
    log.info("serving %s at %s", ", ".join(service.offers), address)
    begun(address)
    server.run(sockets=[listener])


def _end_at_sigterm() -> None:
    """Have SIGTERM end this process like a call that is done, so that nothing is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


def ray_service(options: ServeOptions, limits: Limits, port: int) -> FleetService:
    """Start replicas on the machines of a Ray cluster.

    Args:
        options: the options.
        limits: what callers may ask for.
        port: port at which this server will listen.
    Raises:
        ServingError: if Ray is not installed, or the cluster cannot be joined.
    """
    try:
        from impatient.serving import ray_serve
    except ImportError as error:
        raise ServingError(
            "--ray needs Ray Serve, which is not installed; run pip install 'impatient[ray]'."
        ) from error
    from impatient.serving.fleet import FleetService

    plan = ray_serve.Plan(
        replicas=options.replicas, most=options.most_replicas, drain_s=options.drain_s or 5.0
    )
    ray_serve.join_ray()
    # Ray has put another handler in its place.
    _end_at_sigterm()
    if ray_serve.processors() < plan.replicas * plan.cpus:
        log.warning("the machines of the cluster have too few processors for all replicas")
    fleet = ray_serve.RayFleet(
        load=functools.partial(_hosted_there, options=options),
        sources=[str(path.absolute()) for path in options.directories],
        limits=limits,
        plan=plan,
        # The next server at this place takes over what one that was killed has left.
        name=f"impatient-{socket.gethostname()}-{port}",
    )
    log.info("starting %d replicas, each of which measures its networks", plan.replicas)
    try:
        fleet.deploy()
        offers = asyncio.run(fleet.offers())
    except BaseException:
        # such as Ctrl-C: the cluster may be others' too
        fleet.stop()
        raise
    if sys.platform != "win32":
        # Loading takes seconds, in which the loop goes on.
        renewing = functools.partial(threading.Thread, target=_renew, args=[fleet])
        signal.signal(signal.SIGHUP, lambda *_: renewing().start())
    return FleetService(fleet, offers, limits)


def _hosted_there(source: str, options: ServeOptions) -> Hosted:
    return hosted(Path(source), options)


def _renew(fleet: RayFleet) -> None:
    try:
        fleet.renew()
    except ServingError as error:
        log.error("the replicas stay as they are: %s", error)
    else:
        log.info("all replicas have loaded their networks again")


def rpc_side(service: BaseService, options: ServeOptions, token: str) -> Rpc:
    """Make the gRPC side.

    Raises:
        ServingError: if grpcio is not installed.
    """
    try:
        from impatient.serving.rpc import Rpc
    except ImportError as error:
        raise ServingError(
            "--grpc-port needs grpcio and protobuf, which are not installed; run pip install "
            "'impatient[grpc]'."
        ) from error
    return Rpc(
        service,
        host=options.host,
        port=options.grpc_port or 0,
        token=token,
        begun=lambda address: log.info("and over gRPC at %s", address),
    )


def hosted(path: Path, options: ServeOptions) -> Hosted:
    """Load a run directory's network, and measure it on this machine."""
    from impatient.serving.hosting import hosted_network

    run = RunDirectory(path, trust=options.trust)
    spec = run.spec()
    network, _ = run.network()
    name = path.resolve().name
    log.info("measuring %s", name)
    return hosted_network(
        name,
        network,
        run.recording("validation"),
        preprocess=spec.preprocess,
        classes=spec.class_names,
        input=input_of(spec, network, options.max_batch),
        max_batch=options.max_batch,
    )


def input_of(spec: NetworkSpec, network: Network, most_rows: int) -> InputSpec:
    """Describe what a run's network takes, for callers.

    Raises:
        ServingError: if the protocol has no name for the type of an array.
        DataError: if the tokenizer of its texts cannot be loaded.
    """
    from impatient.serving.tensors import ANY, InputSpec, TensorSpec
    from impatient.training.text import form_of

    if not spec.example_parts:
        dtype = spec.example_dtype
        whole = dtype in ("int64", "int32")
        names = (DATATYPES[dtype],) if whole else ("FP32", "UINT8")
        return InputSpec.one(names, spec.example_shape, most_rows)
    unknown = {part.dtype for part in spec.example_parts.values()} - DATATYPES.keys()
    if unknown:
        raise ServingError(
            f"the samples are arrays of {', '.join(sorted(unknown))}; expected types that the "
            f"protocol has: {', '.join(DATATYPES)}."
        )
    texts = form_of(spec.data, spec.example_parts, network)
    tensors = tuple(
        TensorSpec(
            name=name,
            datatypes=(DATATYPES[part.dtype],),
            shape=part.shape if texts is None else (ANY, *part.shape[1:]),
            filler=0 if texts is None else texts.padding[name],
            usual=part.fill,
            below=texts.vocabulary if texts is not None and name == "input_ids" else None,
        )
        for name, part in spec.example_parts.items()
    )
    if texts is None:
        return InputSpec(tensors=tensors, most_rows=most_rows, named=True)
    length = next(iter(spec.example_parts.values())).shape[0]
    return InputSpec(
        tensors=tensors,
        most_rows=most_rows,
        length=length,
        longest=max(texts.longest, length),
        side=texts.side,
        named=True,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

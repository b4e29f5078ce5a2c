"""A network that a test can hold still, served on a real socket."""

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fakes import wait_until
from impatient import Exit, Network, Run
from impatient.serving.app import App
from impatient.serving.base import Limits
from impatient.serving.connections import bound_socket, web_server
from impatient.serving.model import ServedModel
from impatient.serving.rpc import Rpc
from impatient.serving.service import Hosted, Service
from impatient.serving.tensors import ANY, InputSpec, TensorSpec
from impatient.training.preprocess import Preprocess

SPEC = InputSpec.one(["FP32"], (4,), most_rows=4)


class Gated(Network):
    """Three exits of four classes; a test may hold a stage still, or let it fail."""

    num_exits = 3
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.at: dict[int, Any] = {}

    def exits(self, x, *, keep=False):
        return Run(self._exits(x))

    def _exits(self, x):
        x = x.flatten(1)
        for index, stage in enumerate(self.stages):
            if index in self.at:
                self.at[index]()
            x = stage(x)
            yield Exit(index, x, x)


def hosted(network: Network, name: str = "net", shape: tuple[int, ...] = (4,)) -> Hosted:
    model = ServedModel(name=name, stages_s={1: (1e-4,) * 3}, quality=(0.5, 0.7, 0.9), max_batch=4)
    return Hosted(
        network=network.eval(),
        model=model,
        input=InputSpec.one(["FP32"], shape, most_rows=4),
        preprocess=Preprocess(mean=(), std=()),
        classes=("a", "b", "c", "d"),
    )


TEXTS = InputSpec(
    tensors=(
        TensorSpec(name="input_ids", datatypes=("INT64",), shape=(ANY,), filler=3, below=9),
        TensorSpec(name="attention_mask", datatypes=("INT64",), shape=(ANY,), usual=1),
    ),
    most_rows=4,
    length=4,
    longest=6,
    named=True,
)


class Words(Network):
    """Three exits that say how often each token stands in a text, times 1, 2 and 3."""

    num_exits = 3
    num_classes = 9

    def __init__(self) -> None:
        super().__init__()
        self.hold: Any = None

    def exits(self, x, *, keep=False):
        return Run(self._exits(**x))

    def _exits(self, input_ids, attention_mask):
        counts = (nn.functional.one_hot(input_ids, 9) * attention_mask[..., None]).sum(1).float()
        self.seen = input_ids.tolist()
        for index in range(3):
            if self.hold is not None:
                self.hold()
            yield Exit(index, counts, counts * (index + 1))


def hosted_texts(network: Network, side: str = "right") -> Hosted:
    return dataclasses.replace(
        hosted(network),
        input=dataclasses.replace(TEXTS, side=side),
        classes=tuple("abcdefghi"),
    )


@contextmanager
def serving(*networks: Network, **options: Any) -> Iterator[tuple[Service, int]]:
    """A server on a free port, in a thread of its own, with the options below."""
    with serving_both(*networks, **options) as (service, port, _):
        yield service, port


@contextmanager
def serving_both(
    *networks: Network,
    token: str = "",
    shape: tuple[int, ...] = (4,),
    most_connections: int = 1024,
    head_s: float = 20.0,
    **limits: Any,
) -> Iterator[tuple[Service, int, int]]:
    """The same, with the ports of HTTP and of gRPC."""
    names = ("net", "other")
    models = [
        hosted_texts(one) if isinstance(one, Words) else hosted(one, name, shape)
        for one, name in zip(networks, names, strict=False)
    ]
    service = Service(models, Limits(**{"default_s": 5.0, **limits}))
    listener = bound_socket("127.0.0.1", 0)
    rpc = Rpc(service, host="127.0.0.1", port=0, token=token)
    app = App(service, sides=[rpc], token=token)
    server = web_server(app, most_connections=most_connections, drain_s=1.0, head_s=head_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield service, listener.getsockname()[1], rpc.port
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()

"""Where a value comes from, and whether it still fits network and data."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impatient.errors import StaleInput

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of a value. Attributes that do not apply are None.

    Attributes:
        network: fingerprint of the network's structure (modules, shapes, cuts), without the
            weights.
        weights: fingerprint of the weights.
        data: fingerprint of the data set.
        seed: seed of the random numbers.
        device: device that the network ran on, such as "cpu" or "cuda:0".
        processor: name of the device's model.
        threads: number of intra-op threads of torch.
        dtype: data type of the network's parameters.
        engine: engine that ran the network.
        versions: versions of Python, torch and impatient.
        created: UTC time, ISO 8601.
    """

    network: str | None = None
    weights: str | None = None
    data: str | None = None
    seed: int | None = None
    device: str | None = None
    processor: str | None = None
    threads: int | None = None
    dtype: str | None = None
    engine: str = "eager"
    versions: Mapping[str, str]
    created: str

    def require(self, what: str, remedy: str, **expected: Any) -> None:
        """Raise StaleInput unless every named attribute has the expected value.

        Args:
            what: name of the value in the message, such as "the recording of split 'test'".
            remedy: what to do about it, such as "run `impatient record DIR`".
            **expected: expected values of attributes.
        """
        for name, wanted in expected.items():
            if getattr(self, name) != wanted:
                raise StaleInput(
                    f"{what} was made with another {_PHRASES.get(name, name)}: "
                    f"{getattr(self, name)!r}, but here it is {wanted!r}. To fix this, {remedy}."
                )


_PHRASES = {
    "weights": "set of weights",
    "data": "data set",
    "network": "network structure",
    "threads": "number of threads",
    "versions": "set of versions",
}


def provenance(**known: Any) -> Provenance:
    """Make the provenance of a value that is made now.

    Args:
        **known: attributes of `Provenance` that are known, such as network, weights and data.
    """
    return Provenance(
        versions=versions(), created=datetime.now(UTC).isoformat(timespec="seconds"), **known
    )


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and impatient."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "impatient": own_version(),
    }


def own_version() -> str:
    """Return this package's version, or "unknown" if it was never installed."""
    try:
        return metadata.version("impatient")
    except metadata.PackageNotFoundError:
        return "unknown"


def machine(device: str) -> dict[str, Any]:
    """Describe what measured times depend on besides the network."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor_name()
    return {"device": device, "processor": name, "threads": torch.get_num_threads()}


@functools.cache
def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def dtype_of(model: nn.Module) -> str | None:
    """Return the type of a model's first parameter, None if it has no parameters."""
    return next((str(each.dtype).removeprefix("torch.") for each in model.parameters()), None)


def fingerprint_bytes(*parts: bytes) -> str:
    """Return a short hash of bytes, to notice changes, not for security."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def fingerprint_structure(tensors: Mapping[str, Tensor]) -> str:
    """Return a short hash of the names, types and shapes of tensors."""
    return fingerprint_bytes(
        *(f"{name}{value.dtype}{tuple(value.shape)};".encode() for name, value in tensors.items())
    )


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a short hash of the names, types, shapes and bytes of tensors."""
    from impatient.files import bytes_of

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]

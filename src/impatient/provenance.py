"""Where a file comes from, and whether it still belongs to what is at hand."""

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
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What produced a value; the parts that do not apply are None.

    Attributes:
        network: fingerprint of the network's structure (modules, shapes, cuts), without the
            weights.
        weights: fingerprint of the weights.
        data: fingerprint of the data set.
        seed: the seed of whatever was random.
        device: such as "cpu" or "cuda:0".
        processor: the device's own name.
        threads: intra-op threads torch used.
        dtype: of the network's parameters.
        engine: what ran the network.
        versions: of Python, torch and impatient.
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
        """Raise StaleInput unless every named attribute equals what is expected.

        Args:
            what: the file's name in the message, such as "the recording of split 'test'".
            remedy: what to do about it, such as "run `impatient record DIR`".
        """
        for name, wanted in expected.items():
            if getattr(self, name) != wanted:
                raise StaleInput(
                    f"{what} was made with another {_SPOKEN.get(name, name)}: "
                    f"{getattr(self, name)!r}, "
                    f"but here it is {wanted!r}. To mend it, {remedy}."
                )


_SPOKEN = {
    "weights": "set of weights",
    "data": "data set",
    "network": "network structure",
    "versions": "set of versions",
}


def provenance(**known: Any) -> Provenance:
    """Provenance of something made here and now; say what is known of network, weights, data, seed,
    device.
    """
    return Provenance(
        versions=versions(), created=datetime.now(UTC).isoformat(timespec="seconds"), **known
    )


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    import torch

    return (
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("impatient", own_version()),
    )


def versions() -> dict[str, str]:
    """Versions of Python, torch and impatient."""
    return dict(_versions())


def own_version() -> str:
    """This package's version, or "unknown" when it runs from a folder that was never installed."""
    try:
        return metadata.version("impatient")
    except metadata.PackageNotFoundError:
        return "unknown"


def machine(device: str) -> dict[str, Any]:
    """Describe what measured times depend on besides the network: device and thread count."""
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


def fingerprint_bytes(*parts: bytes) -> str:
    """Short hash of bytes; 16 hex digits, for noticing change, not for security."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def fingerprint_structure(tensors: Mapping[str, Tensor]) -> str:
    """Short hash of named tensors without their values: names, types and shapes."""
    return fingerprint_bytes(
        *(f"{name}{value.dtype}{tuple(value.shape)};".encode() for name, value in tensors.items())
    )


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Short hash of named tensors: names, types, shapes and every byte."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

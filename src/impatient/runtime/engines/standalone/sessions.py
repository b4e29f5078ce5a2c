"""One session with all exits in the engines that run it, computing in the background into memory that is given."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BundleError, Cancelled
from .parts import EnginePart, OnnxRuntimePart, openvino_core, openvino_settings
from .staged import Array
from .streamed import Flight


class OnnxRuntimeSession(OnnxRuntimePart):
    """All exits in one session of ONNX Runtime, on a thread of its own."""

    def _load(self, path: Path, threads: int) -> None:
        super()._load(path, threads)
        self._outputs = [(entry.name, _DTYPES[entry.type], entry.shape[-1]) for entry in self._session.get_outputs()]
        self._thread = ThreadPoolExecutor(1, "impatient-session")

    def memory(self, rows: int) -> list[Array]:
        return [np.full((rows, columns), np.nan, dtype) for _, dtype, columns in self._outputs]

    def begin(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Flight:
        options = self._options()
        return _OnnxRuntimeFlight(self._thread.submit(self._compute, inputs, outputs, options), options)

    def _compute(self, inputs: Sequence[Array], outputs: Sequence[Array], options: Any) -> None:
        binding = self._session.io_binding()
        for name, array in zip(self._names, inputs, strict=True):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for (name, dtype, _), array in zip(self._outputs, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding, options)


# names of ONNX Runtime for what can be NaN
_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


class _OnnxRuntimeFlight:
    def __init__(self, future: Future[None], options: Any) -> None:
        self._future, self._options = future, options

    def ended(self) -> bool:
        if not self._future.done():
            return False
        error = self._future.exception()
        if error is not None and self._options.terminate:
            raise Cancelled("the session was ended by cancel().") from error
        if error is not None:
            raise error
        return True

    def cancel(self) -> None:
        self._options.terminate = True


class OpenVinoSession(EnginePart):
    """All exits in one model of OpenVINO, compiled for each batch size when that first comes.

    With a batch of any size, OpenVINO would compute the outputs somewhere else and copy them when everything is done.
    """

    package = "openvino"

    def _load(self, path: Path, threads: int) -> None:
        import openvino

        self._path, self._model = path, openvino_core().read_model(str(path))
        self._settings, self._tensor = openvino_settings(threads), openvino.Tensor
        self._outputs = [
            (entry.get_element_type().to_dtype(), entry.get_partial_shape()[1].get_length()) for entry in self._model.outputs
        ]
        self._flights: dict[tuple[tuple[int, ...], ...], _OpenVinoFlight] = {}  # per sizes of the inputs, the latest

    def memory(self, rows: int) -> list[Array]:
        return [np.full((rows, columns), np.nan, dtype) for dtype, columns in self._outputs]

    def begin(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Flight:
        shapes = tuple(array.shape for array in inputs)
        with self._lock:
            latest = self._flights.get(shapes)
            request = self._compiled_for(shapes).create_infer_request() if latest is None else latest.given_back()
            self._flights[shapes] = _OpenVinoFlight(request, self._tensor, inputs, outputs)
            return self._flights[shapes]

    def _compiled_for(self, shapes: Sequence[tuple[int, ...]]) -> Any:
        try:
            model = self._model.clone()
            model.reshape(dict(enumerate(map(list, shapes))))
            return openvino_core().compile_model(model, "CPU", self._settings)
        except Exception as error:
            raise BundleError(
                f"openvino cannot compile {self._path} for inputs of {', '.join(map(str, shapes))}: {error} Export with a "
                "session per stage (engine 'openvino')."
            ) from error


class _OpenVinoFlight:
    """A request in flight. It is that of the flight before, which has ended."""

    def __init__(self, request: Any, tensor: Any, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        # held here: a shared tensor does not keep its array alive. OpenVINO wants it in one piece, and writable
        self._held = [*(np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"]) for array in inputs), *outputs]
        self._request, self._lock = request, threading.Lock()
        self._cancelled = self._settled = False
        self._error: Exception | None = None
        for index, array in enumerate(self._held[: len(inputs)]):
            request.set_input_tensor(index, tensor(array, shared_memory=True))
        for index, array in enumerate(outputs):
            request.set_output_tensor(index, tensor(array, shared_memory=True))
        request.start_async()

    def ended(self) -> bool:
        if not self._settled and not self._is_idle():
            return False
        self.given_back()
        if self._error is not None and self._cancelled:
            raise Cancelled("the session was ended by cancel().") from self._error
        if self._error is not None:
            raise self._error
        return True

    def cancel(self) -> None:
        with self._lock:  # once it is settled, the request may be the next flight's
            self._cancelled = True
            if not self._settled:
                self._request.cancel()

    def given_back(self) -> Any:
        """Wait until it has ended, and give the request to the next flight."""
        if not self._settled:
            try:
                self._request.wait()
            except Exception as error:
                self._error = error
            with self._lock:
                self._settled, self._held = True, []
        return self._request

    def _is_idle(self) -> bool:
        with contextlib.suppress(Exception):  # what went wrong is found when it is given back
            return bool(self._request.wait_for(0))
        return True


SESSIONS: dict[str, type[OnnxRuntimeSession | OpenVinoSession]] = {
    "onnxruntime-session": OnnxRuntimeSession, "openvino-session": OpenVinoSession,
}  # fmt: skip

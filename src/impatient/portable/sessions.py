"""Sessions with all exits of a network, in ONNX Runtime and OpenVINO.

A session computes in the background and writes to memory that the caller provides.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BundleError, Cancelled
from .parts import EngineFile, onnxruntime_session, openvino_core, openvino_settings
from .staged import Array
from .streamed import Flight, unwritten


class OnnxRuntimeSession(EngineFile):
    """All exits in one session of ONNX Runtime.

    Flights run one after the other, each on a separate thread.
    """

    package = "onnxruntime"

    def _load(self, path: Path, threads: int) -> None:
        import onnxruntime

        self._session = onnxruntime_session(path, threads)
        self._new_options = onnxruntime.RunOptions
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        self._outputs = [
            (entry.name, _DTYPES[entry.type], entry.shape[-1])
            for entry in self._session.get_outputs()
        ]
        self._turn = threading.Lock()

    def memory(self, rows: int) -> list[Array]:
        return [unwritten(rows, columns, dtype) for _, dtype, columns in self._outputs]

    def busy(self) -> bool:
        return self._turn.locked()

    def begin(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Flight:
        flight = _OnnxRuntimeFlight(self._new_options())
        # The thread keeps the arrays alive, because the session writes to them until it ends.
        threading.Thread(
            target=self._fly, args=(flight, inputs, outputs), name="impatient-session"
        ).start()
        return flight

    def _fly(
        self, flight: _OnnxRuntimeFlight, inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> None:
        try:
            with self._turn:
                self._compute(flight.options, inputs, outputs)
        except BaseException as error:
            # The traceback's frames would keep all arrays of the run alive.
            flight.error = error.with_traceback(None)
        finally:
            flight.over = True

    def _compute(self, options: Any, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        binding = self._session.io_binding()
        for name, array in zip(self._inputs, inputs, strict=True):
            binding.bind_cpu_input(name, np.require(array, requirements=["C_CONTIGUOUS"]))
        for (name, dtype, _), array in zip(self._outputs, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding, options)


# ONNX Runtime's names of the types that can be NaN.
_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


class _OnnxRuntimeFlight:
    def __init__(self, options: Any) -> None:
        self.options = options
        self.over = False
        self.error: BaseException | None = None

    def ended(self) -> bool:
        return self.over and _ended_well(self.error, cancelled=self.options.terminate)

    def cancel(self) -> None:
        self.options.terminate = True


class OpenVinoSession(EngineFile):
    """All exits in one model of OpenVINO, compiled once for each batch size.

    With a dynamic batch size, OpenVINO would compute the outputs in other memory and copy them only
    when all of them are done.
    """

    package = "openvino"
    # How many compiled models are kept: the ones used last.
    MOST = 8

    def _load(self, path: Path, threads: int) -> None:
        import openvino

        self._path = path
        self._model = openvino_core().read_model(str(path))
        self._settings = openvino_settings(threads)
        self._tensor = openvino.Tensor
        self._outputs = [
            (entry.get_element_type().to_dtype(), entry.get_partial_shape()[1].get_length())
            for entry in self._model.outputs
        ]
        self._lock = threading.Lock()
        # One lane per shapes of the inputs. The one used last comes last.
        self._lanes: dict[tuple[tuple[int, ...], ...], _Lane] = {}

    def memory(self, rows: int) -> list[Array]:
        return [unwritten(rows, columns, dtype) for dtype, columns in self._outputs]

    def busy(self) -> bool:
        with self._lock:
            latest = [lane.latest for lane in self._lanes.values()]
        return any(flight is not None and not flight.idle() for flight in latest)

    def begin(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Flight:
        shapes = tuple(array.shape for array in inputs)
        with self._lock:
            lane = self._lanes[shapes] = (
                self._lanes.pop(shapes) if shapes in self._lanes else _Lane()
            )
            while len(self._lanes) > self.MOST:
                del self._lanes[next(iter(self._lanes))]
        # Compiling and waiting block only runs of the same size.
        with lane.lock:
            if lane.latest is None:
                request = self._compiled_for(shapes).create_infer_request()
            else:
                lane.latest.settle()
                request = lane.latest.request
            lane.latest = _OpenVinoFlight(request, self._tensor, inputs, outputs)
            return lane.latest

    def _compiled_for(self, shapes: Sequence[tuple[int, ...]]) -> Any:
        try:
            model = self._model.clone()
            model.reshape(dict(enumerate(map(list, shapes))))
            return openvino_core().compile_model(model, "CPU", self._settings)
        except Exception as error:
            raise BundleError(
                f"openvino cannot compile {self._path} for inputs of "
                f"{', '.join(map(str, shapes))}: {error} Export with a session per stage (engine "
                "'openvino')."
            ) from error


class _Lane:
    """Flights with inputs of one size, run one after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.latest: _OpenVinoFlight | None = None


class _OpenVinoFlight:
    """An infer request in flight, reused from the previous flight, which has settled."""

    def __init__(
        self, request: Any, tensor: Any, inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> None:
        self.request = request
        # Reentrant: garbage collection may call `__del__` while this thread holds a lock.
        self._lock = threading.RLock()
        self._settling = threading.RLock()
        self._cancelled = self._settled = False
        self._error: Exception | None = None
        # The arrays are kept here because a shared tensor does not keep its array alive. OpenVINO
        # needs them contiguous and writable.
        arrays = [np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"]) for array in inputs]
        self._held = [*arrays, *outputs]
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, tensor(array, shared_memory=True))
        for index, array in enumerate(outputs):
            request.set_output_tensor(index, tensor(array, shared_memory=True))
        request.start_async()

    def __del__(self) -> None:
        self.cancel()
        # The request writes to the arrays kept here until it has ended.
        self.settle()

    def ended(self) -> bool:
        if not self.idle():
            return False
        self.settle()
        return _ended_well(self._error, cancelled=self._cancelled)

    def cancel(self) -> None:
        # After this flight has settled, the request may belong to the next one.
        with self._lock:
            self._cancelled = True
            if not self._settled:
                self.request.cancel()

    def settle(self) -> None:
        """Wait until the flight has ended and its request is free."""
        with self._settling:
            if self._settled:
                return
            try:
                self.request.wait()
            except Exception as error:
                self._error = error.with_traceback(None)
            with self._lock:
                self._settled = True
                self._held = []

    def idle(self) -> bool:
        """Tell whether the flight has ended."""
        # `settle` finds and stores an error.
        with contextlib.suppress(Exception):
            return self._settled or bool(self.request.wait_for(0))
        return True


def _ended_well(error: BaseException | None, *, cancelled: bool) -> bool:
    """Return True, or raise the error with which a flight has ended."""
    if error is not None and cancelled:
        raise Cancelled("the session was ended by cancel().") from error
    if isinstance(error, Exception):
        raise BundleError(
            f"the session cannot compute these inputs: {error} Give others; if they are right, "
            "export the network again."
        ) from error
    if error is not None:
        raise error
    return True


SESSIONS: dict[str, type[OnnxRuntimeSession | OpenVinoSession]] = {
    "onnxruntime-session": OnnxRuntimeSession,
    "openvino-session": OpenVinoSession,
}

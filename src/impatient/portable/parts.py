"""Run the ONNX files of an exported directory in an engine."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BundleError, Cancelled
from .staged import Array, CancellablePart


class EngineFile:
    """One ONNX file in an engine.

    Args:
        path: path of the ONNX file.
        threads: number of threads that one call may use.
    Raises:
        BundleError: if the engine is not installed or cannot load the file.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        if threads < 1:
            raise BundleError(f"threads={threads!r}; expected a whole number, at least 1.")
        self.path = Path(path)
        try:
            self._load(self.path, threads)
        except ImportError as error:
            raise BundleError(
                f"{path} runs in {self.package}, which is not installed: pip install "
                f"{self.package}."
            ) from error
        except Exception as error:
            raise BundleError(
                f"{self.package} cannot load {path}: {error} Expected an ONNX file that it "
                "supports; export again."
            ) from error

    package = ""

    def _load(self, path: Path, threads: int) -> None:
        raise NotImplementedError


class BoundPart:
    """A part with memory of its own for what it gives, and mostly for what it takes.

    Attributes:
        outputs: memory of what it gives, in order.

    Thread:
        `cancel` may be called from any thread, everything else from one thread at a time.
    """

    def __init__(
        self, part: EnginePart, inputs: Sequence[Array], outputs: tuple[Array, ...]
    ) -> None:
        self.outputs = outputs
        self._part = part
        # The engine reads this memory.
        self._inputs = inputs

    def __call__(self, *fresh: Array) -> None:
        """Compute the outputs.

        Args:
            fresh: what it takes from elsewhere, of the same shapes each time.
        Raises:
            Cancelled: if `cancel` was called before the call was done.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """End the call early that is in flight, or is about to begin."""
        raise NotImplementedError

    def renew(self) -> None:
        """Forget that a call was cancelled; `cancel` must not be called meanwhile."""
        raise NotImplementedError


class EnginePart(EngineFile, CancellablePart):
    """One ONNX file that is called with numpy arrays in order.

    Attributes:
        takes: number of dimensions of each input; None where it is free.
        gives: number of dimensions of each output; None where it is free.

    Thread:
        May be called and cancelled from several threads at once.
    """

    takes: Sequence[int | None]
    gives: Sequence[int | None]

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        self._lock = threading.Lock()
        # For each thread with a call in flight, the function that ends the call.
        self._in_flight: dict[int, Callable[[], None]] = {}
        super().__init__(path, threads=threads)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Compute the outputs, in the order of the file.

        Later calls do not change them.

        Raises:
            Cancelled: if `cancel` was called before the call was done.
            BundleError: if the engine cannot compute them.
        """
        raise NotImplementedError

    def _failed(
        self, error: Exception, inputs: Sequence[Array], *, cancelled: bool
    ) -> Cancelled | BundleError:
        """Say why a call ended early: by `cancel`, or because the engine could not compute it."""
        if cancelled:
            return Cancelled("the call was ended by cancel().")
        given = ", ".join(f"{array.dtype.name} {list(array.shape)}" for array in inputs)
        return BundleError(
            f"{self.package} cannot run {self.path} with {given or 'no inputs'}: {error} Give "
            "others; if they are right, export the network again."
        )

    def bind(self, inputs: Sequence[Array], fresh: Sequence[int]) -> BoundPart:
        """Compute the outputs once, and bind the memory of all values.

        Args:
            inputs: memory of what the part takes, in order.
            fresh: places of inputs that are given anew at each call.
        """
        raise NotImplementedError

    def one(self, *inputs: Array) -> Array:
        """Compute the only output of a part, such as a head."""
        (output,) = self(*inputs)
        return output

    def cancel(self, thread: int | None = None) -> None:
        with self._lock:
            for number, end in self._in_flight.items():
                if thread in (None, number):
                    end()

    @contextlib.contextmanager
    def _flight(self, end: Callable[[], None]) -> Iterator[None]:
        number = threading.get_ident()
        with self._lock:
            self._in_flight[number] = end
        try:
            yield
        finally:
            with self._lock:
                del self._in_flight[number]


class OnnxRuntimePart(EnginePart):
    """One ONNX file as a session of ONNX Runtime, on the CPU.

    Each session has its own threads, which sleep when there is nothing to do. With threads=1 it
    computes on the caller's thread. The pool that all sessions can share is not used: if set from
    Python (1.31), its threads always spin, which takes the processor from everything else in the
    process, and its size cannot be changed once set.
    """

    package = "onnxruntime"

    def _load(self, path: Path, threads: int) -> None:
        import onnxruntime

        self._session = onnxruntime_session(path, threads)
        inputs = self._session.get_inputs()
        outputs = self._session.get_outputs()
        self._names = [entry.name for entry in inputs]
        self._outputs = [entry.name for entry in outputs]
        self.takes = [len(entry.shape) for entry in inputs]
        self.gives = [len(entry.shape) for entry in outputs]
        # Without checks of names, which cannot be wrong here.
        self._run = self._session._sess.run
        self._new_options = onnxruntime.RunOptions
        # The options of each thread's call in flight.
        self._options: dict[int, Any] = {}

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        # New options for every call: they cannot be reset after `terminate`. So no lock is needed:
        # a late `cancel` ends nothing.
        options = self._new_options()
        number = threading.get_ident()
        self._options[number] = options
        try:
            given = dict(zip(self._names, inputs, strict=True))
            return tuple(self._run(self._outputs, given, options))
        except Exception as error:
            raise self._failed(error, inputs, cancelled=options.terminate) from error
        finally:
            del self._options[number]

    def cancel(self, thread: int | None = None) -> None:
        # A copy, made in one step: calls begin and end meanwhile.
        for number, options in self._options.copy().items():
            if thread in (None, number):
                options.terminate = True

    def bind(self, inputs: Sequence[Array], fresh: Sequence[int]) -> BoundPart:
        outputs = tuple([np.require(output, requirements="C") for output in self(*inputs)])
        binding = self._session.io_binding()
        for place, (name, array) in enumerate(zip(self._names, inputs, strict=True)):
            if place not in fresh:
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        kept = [array for place, array in enumerate(inputs) if place not in fresh]
        for name, array in zip(self._outputs, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        names = [self._names[place] for place in fresh]
        return _OnnxRuntimeBound(self, binding, names, kept, outputs)


class _OnnxRuntimeBound(BoundPart):
    def __init__(
        self,
        part: OnnxRuntimePart,
        binding: Any,
        fresh: Sequence[str],
        inputs: Sequence[Array],
        outputs: tuple[Array, ...],
    ) -> None:
        super().__init__(part, inputs, outputs)
        # The public method checks for captured graphs, which takes as long as a small stage.
        self._run = part._session._sess.run_with_iobinding
        self._binding = binding._iobinding
        self._fresh = fresh
        self._new_options = part._new_options
        self._options = part._new_options()

    def __call__(self, *fresh: Array) -> None:
        # Kept until the call is done.
        arrays = [np.require(array, requirements="C") for array in fresh]
        for name, array in zip(self._fresh, arrays, strict=True):
            self._binding.bind_input(name, array)
        try:
            self._run(self._binding, self._options)
        except Exception as error:
            inputs = [*arrays, *self._inputs]
            raise self._part._failed(error, inputs, cancelled=self._options.terminate) from error

    def cancel(self) -> None:
        self._options.terminate = True

    def renew(self) -> None:
        # Options cannot be reset after `terminate`.
        if self._options.terminate:
            self._options = self._new_options()


def onnxruntime_session(path: Path, threads: int) -> Any:
    """Make a session whose threads sleep when there is nothing to do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OpenVinoPart(EnginePart):
    """One ONNX file compiled by OpenVINO, on the CPU.

    Large outputs are views into an infer request's memory. The request is used again only after
    they have been garbage-collected. Each call in flight has a separate request.
    """

    package = "openvino"
    # Bytes. Outputs up to this size are copied.
    SMALL = 1 << 16
    # Most requests whose outputs may be views. Beyond this, outputs are copied, so that a caller
    # who keeps many outputs needs no more memory than for copies.
    LENT = 4

    def _load(self, path: Path, threads: int) -> None:
        import openvino

        self._compiled = openvino_core().compile_model(str(path), "CPU", openvino_settings(threads))
        self._tensor = openvino.Tensor
        self.takes = [_rank(entry) for entry in self._compiled.inputs]
        self.gives = [_rank(entry) for entry in self._compiled.outputs]
        self._idle: collections.deque[Any] = collections.deque()
        self._made = 0

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        # The arrays are kept here because a shared tensor does not keep its array alive. OpenVINO
        # needs them contiguous and writable.
        arrays = [np.require(value, requirements=["C_CONTIGUOUS", "WRITEABLE"]) for value in inputs]
        loan = _Loan(self._request(), self._idle)
        self._compute(loan.request, arrays)
        return tuple(self._output(loan, index, arrays) for index in range(len(self.gives)))

    def bind(self, inputs: Sequence[Array], fresh: Sequence[int]) -> BoundPart:
        outputs = tuple([np.array(output) for output in self(*inputs)])
        request = self._compiled.create_infer_request()
        for place, array in enumerate(inputs):
            if place not in fresh:
                request.set_input_tensor(place, self._tensor(array, shared_memory=True))
        for place, array in enumerate(outputs):
            request.set_output_tensor(place, self._tensor(array, shared_memory=True))
        kept = [array for place, array in enumerate(inputs) if place not in fresh]
        return _OpenVinoBound(self, request, fresh, kept, outputs)

    def _request(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            with self._lock:
                self._made += 1
            return self._compiled.create_infer_request()

    def _compute(self, request: Any, arrays: Sequence[Array]) -> None:
        ended = threading.Event()

        def end() -> None:
            ended.set()
            request.cancel()

        with self._flight(end):
            try:
                for index, array in enumerate(arrays):
                    request.set_input_tensor(index, self._tensor(array, shared_memory=True))
                # infer() would be 10 us faster, but cannot be cancelled.
                request.start_async()
                request.wait()
            except Exception as error:
                raise self._failed(error, arrays, cancelled=ended.is_set()) from error

    def _output(self, loan: _Loan, index: int, inputs: Sequence[Array]) -> Array:
        array: Array = loan.request.get_output_tensor(index).data
        many = self._made - len(self._idle) > self.LENT
        if (
            many
            or array.nbytes <= self.SMALL
            or any(np.may_share_memory(array, given) for given in inputs)
        ):
            return array.copy()
        return np.asarray(_Lent(array, loan))


def _rank(entry: Any) -> int | None:
    """Return the number of dimensions of an input or output of OpenVINO."""
    rank = entry.get_partial_shape().rank
    return rank.get_length() if rank.is_static else None


class _OpenVinoBound(BoundPart):
    def __init__(
        self,
        part: OpenVinoPart,
        request: Any,
        fresh: Sequence[int],
        inputs: Sequence[Array],
        outputs: tuple[Array, ...],
    ) -> None:
        super().__init__(part, inputs, outputs)
        self._request = request
        self._tensor = part._tensor
        self._fresh = fresh
        self._ended = False

    def __call__(self, *fresh: Array) -> None:
        # A shared tensor must be contiguous and writable, and does not keep its array alive.
        arrays = [np.require(array, requirements=["C", "W"]) for array in fresh]
        for place, array in zip(self._fresh, arrays, strict=True):
            self._request.set_input_tensor(place, self._tensor(array, shared_memory=True))
        try:
            # infer() would be faster, but cannot be cancelled.
            self._request.start_async()
            if self._ended:
                # A request that has not started cannot be cancelled.
                self._request.cancel()
            self._request.wait()
        except Exception as error:
            inputs = [*arrays, *self._inputs]
            raise self._part._failed(error, inputs, cancelled=self._ended) from error

    def cancel(self) -> None:
        self._ended = True
        self._request.cancel()

    def renew(self) -> None:
        self._ended = False


@functools.cache
def openvino_core() -> Any:
    """Return OpenVINO's core, which is made once per process."""
    import openvino

    return openvino.Core()


def openvino_settings(threads: int) -> dict[str, Any]:
    """Return the settings with which models are compiled for the CPU."""
    # f32: on processors with bfloat16, OpenVINO would otherwise compute in bfloat16.
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }


class _Loan:
    """An infer request that becomes idle when its outputs are garbage-collected."""

    __slots__ = ("_idle", "request")

    def __init__(self, request: Any, idle: collections.deque[Any]) -> None:
        self.request = request
        self._idle = idle

    def __del__(self) -> None:
        self._idle.append(self.request)


class _Lent:
    """Output memory whose numpy arrays and views keep the loan alive."""

    def __init__(self, array: Array, loan: _Loan) -> None:
        self.__array_interface__ = array.__array_interface__
        self._loan = loan


ENGINES: dict[str, type[EnginePart]] = {"onnxruntime": OnnxRuntimePart, "openvino": OpenVinoPart}

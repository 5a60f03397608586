"""An emulated CUDA device under torch's CPU build: import this before torch, then `install()`.

`device.cpp` says what is emulated, and `build.py` compiles it.
"""

from __future__ import annotations

import ctypes
import sys

from support.emulated import why_not
from support.emulated.build import built

if "torch" in sys.modules:
    raise ImportError(why_not() or "the emulated CUDA device must be there before torch looks for one")
_library = ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
_NUMBERS = "stream_current event_record graph_begin random_size memory_allocated memory_reserved"
_TEXTS = "graph_end graph_replay told_findings told_waits"
for _name in f"{_NUMBERS} memory_peak".split():
    getattr(_library, _name).restype = ctypes.c_int64
for _name in _TEXTS.split():
    getattr(_library, _name).restype = ctypes.c_char_p

import torch  # noqa: E402

I64 = ctypes.c_int64
STREAMS = 32  # of a device; a program that asks for more gets the first ones again


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.number = 0  # not recorded

    def record(self, stream: Stream | None = None) -> None:
        self.number = _library.event_record(I64((stream or current_stream()).number))

    def wait(self, stream: Stream | None = None) -> None:
        if self.number:
            _library.event_wait(I64((stream or current_stream()).number), I64(self.number))

    def synchronize(self) -> None:
        if self.number:
            _library.event_synchronize(I64(self.number))

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0  # ms: nothing here takes time


class Stream:
    made = 0

    def __init__(self, device: object = None, priority: int = 0, *, number: int | None = None):
        if number is None:
            number = 1 + Stream.made % STREAMS
            Stream.made += 1
        self.number = number
        self.device = torch.device("cuda", 0)

    def wait_stream(self, other: Stream) -> None:
        _library.stream_wait_stream(I64(self.number), I64(other.number))

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _library.stream_synchronize(I64(self.number))

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number


class OnStream:
    """`torch.cuda.stream(stream)`."""

    def __init__(self, stream: Stream | None):
        self.stream = stream
        self.before: Stream | None = None

    def __enter__(self) -> None:
        self.before = current_stream()
        if self.stream is not None:
            set_stream(self.stream)

    def __exit__(self, *error: object) -> None:
        assert self.before is not None
        set_stream(self.before)


def current_stream(device: object = None) -> Stream:
    return Stream(number=_library.stream_current())


def set_stream(stream: Stream) -> None:
    _library.stream_set(I64(stream.number))


class CUDAGraph:
    def __init__(self, keep_graph: bool = False):
        self.number = 0  # not captured

    def capture_begin(self, pool: int | None = None, **modes: object) -> None:
        if current_stream().number == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.number = _library.graph_begin(pool or 0)

    def capture_end(self) -> None:
        error = _library.graph_end().decode()
        if error:
            raise RuntimeError(f"CUDA error: operation failed due to an error during capture ({error})")

    def replay(self) -> None:
        error = _library.graph_replay(I64(self.number)).decode()
        if error:
            raise RuntimeError(error)

    def pool(self) -> int:
        return int(_library.graph_pool(I64(self.number)))

    def __del__(self) -> None:
        if self.number:
            _library.graph_destroy(I64(self.number))


def get_rng_state(device: object = None) -> torch.Tensor:
    state = torch.empty(_library.random_size(), dtype=torch.uint8)
    _library.random_get(ctypes.c_void_p(state.data_ptr()))
    return state


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    _library.random_set(ctypes.c_void_p(state.contiguous().data_ptr()))


def set_sync_debug_mode(mode: str | int) -> None:
    _library.waiting_fails(mode in ("error", 2))


def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    _library.memory_record(ctypes.c_void_p(tensor.untyped_storage().data_ptr()), I64(stream.number))


def install() -> None:
    """Put the device in the place of `torch.cuda`'s, for the rest of this process."""
    cuda = torch.cuda
    for name, value in {
        # it is there
        "is_available": lambda: True,
        "is_built": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "emulated GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "set_device": lambda device: None,
        # streams, events and graphs
        "Stream": Stream,
        "Event": Event,
        "stream": OnStream,
        "StreamContext": OnStream,
        "current_stream": current_stream,
        "set_stream": set_stream,
        "default_stream": lambda device=None: Stream(number=0),
        "synchronize": lambda device=None: _library.device_synchronize(),
        "CUDAGraph": CUDAGraph,
        "is_current_stream_capturing": lambda: bool(_library.graph_capturing()),
        "set_sync_debug_mode": set_sync_debug_mode,
        # memory
        "memory_allocated": lambda device=None: _library.memory_allocated(),
        "memory_reserved": lambda device=None: _library.memory_reserved(),
        "max_memory_allocated": lambda device=None: _library.memory_peak(),
        "reset_peak_memory_stats": lambda device=None: _library.memory_reset_peak(),
        "empty_cache": lambda: _library.memory_empty_cache(),
        # random numbers
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": lambda seed: _library.random_seed(ctypes.c_uint64(seed)),
        "manual_seed_all": lambda seed: _library.random_seed(ctypes.c_uint64(seed)),
    }.items():
        setattr(cuda, name, value)
    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign, assignment]
    cuda.graphs.CUDAGraph = CUDAGraph
    torch._C._host_emptyCache = lambda: None  # type: ignore[attr-defined]


def _counts(told: bytes) -> dict[str, int]:
    lines = (line.split("\t", 1) for line in told.decode().splitlines())
    return {sentence: int(times) for times, sentence in lines}


def findings() -> dict[str, int]:
    """Return which rules were broken since `forget`, each a sentence and how often."""
    return _counts(_library.told_findings())


def waits() -> dict[str, int]:
    """Return why the host waited for the device since `forget`, and how often."""
    return _counts(_library.told_waits())


def forget() -> None:
    _library.forget()

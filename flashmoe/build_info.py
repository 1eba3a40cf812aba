"""What this installation was built from and what it holds: ``flashmoe/_build_info.json``, typed.

The build writes that file (cmake/build_info.py); this module only reads it, and imports nothing
heavy.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import flashmoe
from flashmoe.errors import FlashmoeError


def _located(*parts: str) -> Path:
    """A file that the build put into the package, whether or not it is there.

    An editable installation's package has two places: the source tree, and where the build went.
    """
    places = [Path(root, *parts) for root in flashmoe.__path__]
    return next((place for place in places if place.is_file()), places[0])


@dataclass(frozen=True)
class Kernel:
    """What the compiler said of one entry point of a cubin: registers a thread, bytes a thread."""

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class Cubin:
    """One compiled kernel file.

    ``kernel`` is its name without flavour and architecture, ``arch`` as nvcc spells it (sm_90a),
    ``flavour`` the transport it was linked for (``p2p`` or ``nvshmem``), ``kernels`` its entry
    points by name.
    """

    file: str
    kernel: str
    arch: str
    flavour: str
    kernels: tuple[Kernel, ...] = ()

    @property
    def path(self) -> Path:
        """Where the file lies in this installation."""
        return _located("kernels", "cubin", self.file)

    @property
    def compute_capability(self) -> tuple[int, int]:
        """The capability it is compiled for: ``sm_90a`` -> (9, 0)."""
        digits = self.arch.removeprefix("sm_").rstrip("af")
        return int(digits[:-1]), int(digits[-1])


@dataclass(frozen=True)
class BuildInfo:
    """One build of flashmoe.

    ``commit`` and ``dirty`` are None where the source came without its history.  ``built`` is UTC,
    ISO 8601.  ``why_no_host_engine`` and ``why_no_cubins`` are empty where the build holds them.
    ``nvshmem`` is the version that the flavour of that name is compiled with; None where it is left
    out, and then ``why_no_nvshmem`` says why, should there be other cubins.
    """

    version: str
    commit: str | None
    dirty: bool | None
    built: str | None
    system: str | None
    python: str | None
    cxx: str | None
    nvcc: str | None
    why_no_host_engine: str
    cubins: tuple[Cubin, ...]
    why_no_cubins: str
    nvshmem: str | None = None
    why_no_nvshmem: str = ""

    @property
    def flavours(self) -> tuple[str, ...]:
        """The transport flavours held, sorted."""
        return tuple(sorted({cubin.flavour for cubin in self.cubins}))

    @property
    def revision(self) -> str:
        """The commit in twelve digits, ``+dirty`` where the tree held changes, or ``unknown``."""
        if self.commit is None:
            return "unknown"
        return self.commit[:12] + ("+dirty" if self.dirty else "")

    def lines(self) -> list[str]:
        """The build in words, a line a subject: what ``--version -v`` and ``doctor`` print."""
        cubins = ", ".join(f"{c.kernel} {c.flavour} {c.arch}" for c in self.cubins)
        compilers = [self.cxx or "no C++ compiler", f"nvcc {self.nvcc}" if self.nvcc else "no nvcc"]
        if self.nvshmem:
            compilers.append(f"NVSHMEM {self.nvshmem}")
        if self.cubins and self.why_no_nvshmem:
            cubins += f"; none of the flavour nvshmem: {self.why_no_nvshmem}"
        return [
            f"flashmoe {self.version}, commit {self.revision}, built {self.built or 'never'}",
            f"host engine: {self.why_no_host_engine or 'yes'}",
            f"GPU kernels: {cubins or 'none: ' + self.why_no_cubins}",
            f"compilers: {', '.join(compilers)}; for Python {self.python or '?'} on "
            f"{self.system or '?'}",
        ]


def parse(text: str) -> BuildInfo:
    """``_build_info.json`` as a :class:`BuildInfo`; raises FlashmoeError where it is not one."""
    try:
        raw = json.loads(text)
        return BuildInfo(
            version=raw["version"],
            commit=raw["commit"],
            dirty=raw["dirty"],
            built=raw["built"],
            system=raw["system"],
            python=raw["python"],
            cxx=raw["cxx"],
            nvcc=raw["nvcc"],
            why_no_host_engine=raw["why_no_host_engine"] or "",
            cubins=tuple(
                Cubin(**{**entry, "kernels": tuple(Kernel(**k) for k in entry["kernels"])})
                for entry in raw["cubins"]
            ),
            why_no_cubins=raw["why_no_cubins"] or "",
            nvshmem=raw["nvshmem"],
            why_no_nvshmem=raw["why_no_nvshmem"] or "",
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise FlashmoeError(
            f"flashmoe/_build_info.json is damaged: {exc!r}", "install flashmoe again"
        ) from exc


@cache
def build_info() -> BuildInfo:
    """This installation's build; a source tree that was never built says so in its reasons."""
    written = _located("_build_info.json")
    if written.is_file():
        return parse(written.read_text(encoding="utf-8"))
    unbuilt = "this source tree is not built: run `make dev`"
    return BuildInfo(
        version=flashmoe.__version__,
        commit=None,
        dirty=None,
        built=None,
        system=None,
        python=None,
        cxx=None,
        nvcc=None,
        why_no_host_engine=unbuilt,
        cubins=(),
        why_no_cubins=unbuilt,
    )


def require_runner() -> None:
    """Raises FlashmoeError where this installation reads traces but can run nothing."""
    if importlib.util.find_spec("torch") is None:
        raise FlashmoeError(
            "flashmoe cannot run a layer here: torch is not installed",
            "run on Linux x86_64, where pip brings torch along; a trace from there is read here",
        )

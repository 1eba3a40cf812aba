"""SGLang's published wheel, read where it lies: its Triton kernels and its tuned configurations.

Nothing of it is copied into this package.  The wheel need not be importable: single modules are
taken out into a temporary folder and executed with whatever they import of SGLang itself, of its
compiled kernels and of vLLM replaced by stand-ins that say "plain NVIDIA GPU, nothing else".
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashmoe.bench.peers.base import Unavailable
from flashmoe.errors import one_line

VARIABLE = "FLASHMOE_SGLANG_WHEEL"
_STOOD_IN = ("sglang", "sgl_kernel", "vllm", "aiter")
_CONFIG = re.compile(
    r"configs/(?:triton_(?P<triton>[\d_]+)/)?E=(?P<E>\d+),N=(?P<N>\d+),"
    r"device_name=(?P<device>[^,/]+?)(?P<down>_down)?\.json$"
)


class Source:
    """The files of a wheel, of a zip with a wheel's layout, or of a folder with one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._folder = place if place.is_dir() else None
        try:
            self._zip = None if self._folder else zipfile.ZipFile(place)
        except (OSError, zipfile.BadZipFile) as exc:
            raise Unavailable(f"{place} is no wheel: {exc}") from exc

    def names(self) -> list[str]:
        """The files below, as paths with slashes."""
        if self._zip is not None:
            return self._zip.namelist()
        assert self._folder is not None
        roots = [p for p in self._folder.iterdir() if p.name.lower().startswith("sglang")]
        return [
            str(file.relative_to(self._folder))
            for root in roots
            for file in ([root] if root.is_file() else root.rglob("*"))
            if file.is_file()
        ]

    def read(self, name: str) -> str:
        """The text of one file."""
        if self._zip is not None:
            return self._zip.read(name).decode("utf-8")
        assert self._folder is not None
        return (self._folder / name).read_text(encoding="utf-8")

    def version(self) -> str:
        """What the wheel says its version is, or ``unknown``."""
        for name in self.names():
            if re.search(r"(^|/)sglang-[^/]*\.dist-info/METADATA$", name):
                found = re.search(r"^Version: (.+)$", self.read(name), re.M)
                if found:
                    return found.group(1).strip()
        return "unknown"

    def holding(self, file: str, *words: str) -> str:
        """The name of the first ``file`` that holds all ``words``; Unavailable where none does."""
        for name in sorted(self.names(), key=len):
            if name.rpartition("/")[2] == file:
                text = self.read(name)
                if all(word in text for word in words):
                    return name
        raise Unavailable(f"{self.place.name} holds no {file} with {', '.join(words)}")


def locate(given: Path | None) -> Source:
    """The wheel to read: ``given``, else $FLASHMOE_SGLANG_WHEEL, else an installed SGLang.

    Raises Unavailable with what to do where there is none.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        if not named.exists():
            raise Unavailable(f"no file {named}")
        return Source(named)
    try:
        installed = importlib.metadata.distribution("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(
            "no SGLang wheel: pip download --no-deps sglang, then --sglang-wheel FILE or "
            f"{VARIABLE}=FILE"
        ) from None
    return Source(Path(str(installed.locate_file(""))))


# -- configurations -----------------------------------------------------------------------------


def choose_config(
    names: Iterable[str],
    experts: int,
    intermediate: int,
    devices: Iterable[str],
    triton: str,
    down: bool = False,
) -> str | None:
    """The configuration file for a layer's GEMMs, or None where none was published.

    With ``down`` the one that is for the second product alone, which few layers have.

    ``devices`` are GPU names as files spell them (``NVIDIA_H200``), best first.  Of one device's
    files, that of the running ``triton`` (``3.6.0``) comes first, then the newest: SGLang's order.
    """
    found: dict[str, list[tuple[bool, tuple[int, ...], str]]] = {}
    for name in names:
        match = _CONFIG.search(name)
        if match is None or bool(match["down"]) != down:
            continue
        if (int(match["E"]), int(match["N"])) == (experts, intermediate):
            version = (match["triton"] or "0").replace("_", ".")
            numbers = tuple(int(part) for part in version.split("."))
            found.setdefault(match["device"], []).append((version == triton, numbers, name))
    for device in devices:
        if device in found:
            return max(found[device])[2]
    return None


def nearest(by_tokens: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The entry of a configuration file for the number of tokens nearest to ``tokens``.

    Without ``USE_TMA``: this peer's launches are those without tensor copies (``NOTE`` of
    triton_moe.py says so with each result).
    """
    key = min(by_tokens, key=lambda text: abs(int(text) - tokens))
    return {name: value for name, value in by_tokens[key].items() if name != "USE_TMA"}


def published(source: Source, device: str, tokens: int) -> list[dict[str, Any]]:
    """Every configuration published for ``device`` near ``tokens``, the most frequent first."""
    seen: dict[tuple[tuple[str, Any], ...], int] = {}
    for name in sorted(source.names()):
        match = _CONFIG.search(name)
        if match is not None and match["device"] == device:
            entry = tuple(sorted(nearest(json.loads(source.read(name)), tokens).items()))
            seen[entry] = seen.get(entry, 0) + 1
    return [dict(entry) for entry in sorted(seen, key=lambda e: -seen[e])]


# -- modules ------------------------------------------------------------------------------------


class _Nothing:
    """False, and so is everything one asks it for or calls it with."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __bool__(self) -> bool:
        return False


def _absent(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name} of SGLang is not part of this peer")

    return call


def _stand_in(name: str, given: Mapping[str, Any]) -> Any:
    if name in given:
        return given[name]
    if name in ("is_cuda", "is_sm90_supported"):
        return lambda *args: True
    if name.startswith(("is_", "cpu_has", "get_bool")):
        return lambda *args: False
    if name == "get_moe_padding_size":
        return lambda *args: 0
    if name in ("envs", "get_exec", "get_global_server_args"):
        return _Nothing()
    return _absent(name)


def _imports(text: str) -> dict[str, set[str]]:
    """What a module imports, outside its functions, of what is stood in for: names by module."""
    wanted: dict[str, set[str]] = {}

    def visit(nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                if node.module.split(".")[0] in _STOOD_IN:
                    names = wanted.setdefault(node.module, set())
                    names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in _STOOD_IN:
                        wanted.setdefault(alias.name, set())
            visit(ast.iter_child_nodes(node))

    visit(ast.parse(text).body)
    return wanted


@contextmanager
def _standing_in(wanted: Mapping[str, set[str]], given: Mapping[str, Any]) -> Iterator[None]:
    """Modules of stand-ins in place of real ones, which come back afterwards."""
    modules: dict[str, types.ModuleType] = {}
    for module, names in wanted.items():
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            dotted = ".".join(parts[:depth])
            made = modules.setdefault(dotted, types.ModuleType(dotted))
            made.__path__ = []
            if depth > 1:
                setattr(modules[".".join(parts[: depth - 1])], parts[depth - 1], made)
        for name in names:
            if not hasattr(modules[module], name):
                setattr(modules[module], name, _stand_in(name, given))
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module_before in before.items():
            if module_before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module_before


_loaded = itertools.count(1)


def load(source: Source, name: str, given: Mapping[str, Any] | None = None) -> types.ModuleType:
    """Executes one module of the wheel alone; ``given`` overrides stand-ins by their name.

    Raises Unavailable where it cannot be executed here.
    """
    text = source.read(name)
    # Triton reads a kernel's source from its file when it is declared, and never again.
    with tempfile.TemporaryDirectory(prefix="flashmoe-bench-") as folder:
        file = Path(folder, name.rpartition("/")[2])
        file.write_text(text, encoding="utf-8")
        own_name = f"flashmoe_bench_peer_{next(_loaded)}_{file.stem}"
        spec = importlib.util.spec_from_file_location(own_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[own_name] = module
        try:
            with _standing_in(_imports(text), given or {}):
                spec.loader.exec_module(module)
        except Exception as exc:
            del sys.modules[own_name]
            raise Unavailable(f"{name} does not load here: {one_line(exc)}") from exc
    return module

"""How tiles are cut, where ``flashmoe tune`` has found something better on this machine.

The table is a JSON file in the user's configuration directory.  An entry is keyed by what the cut
may depend on without the number of ranks changing a result: architecture, H, I and dtype.  Whoever
makes a launch asks :func:`tiling_of`; a run's ``run.json`` records what it was told.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.errors import FlashmoeError

if TYPE_CHECKING:
    from flashmoe.config import MoEConfig

SCHEMA = 1
VARIABLE = "FLASHMOE_TUNING"
_KEY = ("arch", "H", "I", "dtype")


@dataclass(frozen=True)
class Tiling:
    """``tile_rows``: the most rows of tokens that a tile may have.  ``waves``: into how many waves
    an owner's experts are cut, which orders tiles and changes no bit of a result."""

    tile_rows: int
    waves: int


def table_path() -> Path:
    """The table: $FLASHMOE_TUNING, or flashmoe/tuning.json where the user's configuration is."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "flashmoe" / "tuning.json"


def key_of(config: MoEConfig, arch: str) -> dict[str, Any]:
    """The fields that an entry for the layer has."""
    return dict(zip(_KEY, (arch, config.hidden, config.intermediate, config.dtype), strict=True))


def tiling_of(config: MoEConfig, arch: str, default: Tiling, step: int) -> Tiling:
    """The table's word on the layer, or ``default`` where it has none.

    ``default.tile_rows`` is the most that the kernel takes, ``step`` what heights are multiples of.
    Raises FlashmoeError where the table cannot be read, or says what the kernel does not take.
    """
    path = table_path()
    key = key_of(config, arch)
    for entry in _entries(path, _stamp(path)):
        if all(entry[name] == value for name, value in key.items()):
            found = Tiling(entry["tile_rows"], entry["waves"])
            if not takes(found, default, step):
                raise _damaged(path, f"{found} is not what this kernel takes")
            return found
    return default


def takes(tiling: Tiling, most: Tiling, step: int) -> bool:
    """Whether the kernel can be told so: ``most.tile_rows`` rows at most, in multiples of step."""
    rows_fit = 0 < tiling.tile_rows <= most.tile_rows and tiling.tile_rows % step == 0
    return rows_fit and 0 < tiling.waves <= 1024


def described(config: MoEConfig, arch: str, tiling: Tiling, default: Tiling) -> dict[str, Any]:
    """A launch's cut as run.json has it: ``tuned`` is a hash of key and cut, None if untuned."""
    said = {**key_of(config, arch), **asdict(tiling)}
    text = json.dumps(said, sort_keys=True).encode()
    digest = None if tiling == default else hashlib.sha256(text).hexdigest()
    return {**asdict(tiling), "tuned": digest}


def put(entry: dict[str, Any]) -> Path:
    """Writes ``entry`` (its key, a Tiling's fields, ``measured``) into the table; gives its path.

    The entry of the same key is replaced, all others stay.  Raises FlashmoeError where the table
    that is there cannot be read, or the file cannot be written.
    """
    path = table_path()
    others = [
        other
        for other in _entries(path, _stamp(path))
        if any(other[name] != entry[name] for name in _KEY)
    ]
    text = json.dumps({"schema": SCHEMA, "entries": [*others, entry]}, indent=2) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as exc:
        raise FlashmoeError(
            f"{path} can't be written: {exc.strerror}", f"name another file by ${VARIABLE}"
        ) from exc
    finally:
        partial.unlink(missing_ok=True)
    return path


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_size


@functools.lru_cache(maxsize=4)
def _entries(path: Path, stamp: tuple[int, int] | None) -> tuple[dict[str, Any], ...]:
    """The table's entries; ``stamp`` tells a file that was written anew from what was read."""
    if stamp is None:
        return ()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version, entries = table["schema"], tuple(table["entries"])
        whole = all(isinstance(e[name], int) for e in entries for name in ("tile_rows", "waves"))
        if not (whole and all(name in e for e in entries for name in _KEY)):
            raise _damaged(path, "an entry lacks a field")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise _damaged(path, f"{type(exc).__name__}: {exc}") from exc
    if version > SCHEMA:
        raise _damaged(path, f"it is of version {version}, and this flashmoe reads up to {SCHEMA}")
    return entries


def _damaged(path: Path, why: str) -> FlashmoeError:
    return FlashmoeError(
        f"the tuning table {path} is of no use: {why}",
        f"remove it and run flashmoe tune again, or point ${VARIABLE} elsewhere",
    )

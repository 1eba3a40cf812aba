"""The tensors of a Hugging Face folder: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from flashmoe.errors import FlashmoeError

ROUNDABLE = frozenset({"BF16", "F16", "F32", "F64"})
"""safetensors' names of the dtypes that bf16 and fp16 can be rounded from."""


def wrong(message: str, hint: str) -> FlashmoeError:
    """An error of what a user gave: exit code 2."""
    return FlashmoeError(message, hint, exit_code=2)


class TensorFiles:
    """The tensors of a folder by name, each in its own safetensors file, opened when needed."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        self._files = files
        self._open: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            self.file_of = self._read_index(index)
        elif single.is_file():
            self.file_of = dict.fromkeys(self._file(single.name).keys(), single.name)
        elif any(folder.glob("pytorch_model*.bin")):
            raise wrong(
                f"{folder} holds pytorch_model.bin, not safetensors",
                "convert it: from_pretrained(...).save_pretrained(...) writes safetensors",
            )
        else:
            raise wrong(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json",
                "download the weights too, not only the configuration",
            )

    @staticmethod
    def _read_index(index: Path) -> dict[str, str]:
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # A file name with a folder in it would leave the checkpoint.
            if all(Path(f).name == f for f in names.values()):
                return dict(names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as why:
            raise wrong(f"{index} is no index of tensors", "download it again") from why
        raise wrong(f"{index} names files outside its folder", "download it again")

    def _file(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                raise wrong(f"{path} is missing", "the index names it; download it")
            try:
                opened = safe_open(path, framework="pt")
                self._open[name] = self._files.enter_context(opened)
            except (OSError, SafetensorError) as why:
                raise wrong(
                    f"{path} can't be read: {why}", "it may be truncated; download it again"
                ) from why
        return self._open[name]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype: BF16, F32, F8_E4M3 and so on."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        if name not in self.file_of:
            raise wrong(
                f"{self.folder} lacks the tensor {name}",
                "the download may be incomplete, or the layer of another kind",
            )
        from safetensors import SafetensorError

        try:
            return self._file(self.file_of[name]).get_slice(name)
        except SafetensorError as why:
            raise wrong(
                f"{self.folder / self.file_of[name]} lacks the tensor {name}",
                "the index says it is there; download the file again",
            ) from why

    def read_into(self, name: str, into: torch.Tensor) -> None:
        """Copies a tensor to ``into``, rounding to its dtype; shapes must agree."""
        found = self._slice(name)
        shape = list(found.get_shape())
        if shape != list(into.shape):
            raise wrong(
                f"{name} has shape {shape}, config.json asks for {list(into.shape)}",
                "config.json and the weights are not of the same model",
            )
        if found.get_dtype() not in ROUNDABLE:
            raise unsupported(name, str(found.get_dtype()))
        into.copy_(found[:])


def unsupported(name: str, dtype: str) -> FlashmoeError:
    """The error of a tensor whose dtype can't be rounded to the layer's."""
    return wrong(
        f"{name} is {dtype}, the kernel takes bf16 and fp16",
        "use a checkpoint in bfloat16: quantised ones must be dequantised first",
    )

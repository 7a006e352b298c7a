"""A GGUF opened for reading: fields by name, tensors as fp32, and one line for whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from groundup.errors import UserError
from groundup.export.package import gguf_package

_REFETCH = "fetch or export the file again"


class GgufFile:
    """Fields and tensors of one file, which is mapped, not read: a tensor costs memory only while it is held.

    Raises UserError: no such file, not a GGUF, cut short or damaged, one part of several.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = gguf_package()
        if not self.path.is_file():
            raise UserError(self.path, "is not a file", "give the path of a .gguf file")
        try:
            with self.path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise UserError(self.path, f"cannot be read ({error.strerror})", "mend its permissions") from None
        if magic != b"GGUF":
            raise UserError(self.path, "is not a GGUF file", "give the path of a .gguf file")
        try:
            self._reader = _strict_reader(self._gguf)(self.path)
            self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            self.architecture: str = self.get("general.architecture", "")
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
            why = f"is cut short or damaged ({error})"
            raise UserError(self.path, why, _REFETCH) from None
        if self.get("split.count", 1) > 1:
            raise UserError(self.path, "is one part of several", "join them first: llama-gguf-split --merge")

    def get(self, key: str, default: Any = None) -> Any:
        """A field's value; `default` where the file has none."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """A field of the architecture, `block_count` standing for `llama.block_count`."""
        return self.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> int:
        """A whole number that the architecture must have. UserError where it is missing or no number."""
        value = self.own(key)
        if isinstance(value, list) and len(set(value)) == 1:  # the same for every layer, written once a layer
            value = value[0]
        if not isinstance(value, int):
            raise UserError(self.path, f"{self.architecture}.{key} is {value!r}, not a whole number", _REFETCH)
        return value

    def array(self, name: str) -> np.ndarray:
        """A tensor as fp32, in rows as PyTorch has them. UserError for a type that the gguf package cannot read."""
        tensor = self.tensors[name]
        try:
            return np.array(self._gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            why = f"{name} has type {tensor.tensor_type.name}, which cannot be read"
            raise UserError(self.path, why, "use another quantisation") from None

    def types(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        names = [tensor.tensor_type.name for tensor in self.tensors.values()]
        return {name: names.count(name) for name in sorted(set(names))}


def shortest(value: float) -> float:
    """The number that a person wrote before it was stored as fp32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _strict_reader(gguf: Any) -> Any:
    """The package's reader, which takes what lies past the end of the file for empty, made to refuse it at once."""

    class Strict(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > len(self.data):
                raise ValueError("a list is longer than the file")
            return super()._get_field_parts(orig_offs, raw_type)

    return Strict

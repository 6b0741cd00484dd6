"""Reading a flatbuffer by the numbers of its fields, as its schema orders them; a union takes two, type and table."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap

Buffer = bytes | mmap


@dataclass(frozen=True)
class Table:
    """A table of a flatbuffer that is anywhere in `data`. A field that is not there is 0 or empty.

    Reading raises `struct.error` outside of `data`, and `ValueError` for a text that is none.
    """

    data: Buffer
    at: int

    @classmethod
    def root(cls, data: Buffer, at: int) -> Table:
        """at: where the flatbuffer begins."""
        return cls(data, at + number(data, "I", at))

    def number(self, field: int, kind: str = "I", default: int = 0) -> int:
        """kind: of `struct`."""
        place = self._place(field)
        return default if place is None else number(self.data, kind, place)

    def table(self, field: int) -> Table | None:
        place = self._place(field)
        return None if place is None else Table.root(self.data, place)

    def tables(self, field: int) -> Sequence[Table]:
        start, n = self._vector(field)
        return [Table.root(self.data, start + 4 * i) for i in range(n)]

    def text(self, field: int) -> str:
        return self.content(field, 1).decode()

    def content(self, field: int, n_bytes: int) -> bytes:
        """Of a vector of scalars of so many bytes each."""
        start, n = self._vector(field)
        return self.data[start : start + n * n_bytes]

    def _vector(self, field: int) -> tuple[int, int]:
        """(where its elements begin, how many there are)."""
        place = self._place(field)
        if place is None:
            return 0, 0
        start = place + number(self.data, "I", place)
        return start + 4, number(self.data, "I", start)

    def _place(self, field: int) -> int | None:
        vtable = self.at - number(self.data, "i", self.at)
        slot = 4 + 2 * field
        offset = number(self.data, "H", vtable + slot) if slot < number(self.data, "H", vtable) else 0
        return self.at + offset if offset else None


def number(data: Buffer, kind: str, at: int) -> int:
    if at < 0:
        raise struct.error(f"a place before the data, {at}")
    value: int = struct.unpack_from(f"<{kind}", data, at)[0]
    return value

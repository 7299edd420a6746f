"""Whether somebody talks in small pieces, on whatever tunnel of this process.

A large piece is cheap per byte. But what comes beside is sealed and sent behind the pieces of its turn, a megabyte
where eight streams read 128 KiB each. So bulk data of several streams is read in large pieces while nobody else
talks, and in small ones while somebody does.
"""

from __future__ import annotations

from typing import Final

SHARED_READ_BYTES: Final = 32_768  # the largest piece while somebody talks
SHARED_READS: Final = 256  # of bulk data, after a small piece was seen; with eight streams that is 32 turns


class Talk:
    """One for all tunnels of a process; relays count in it.

    Attributes:
        shared_reads: how many of the next reads of bulk data are limited to SHARED_READ_BYTES.
    """

    __slots__ = ("shared_reads",)

    def __init__(self) -> None:
        self.shared_reads = 0

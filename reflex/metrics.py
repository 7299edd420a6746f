"""Counters of one process, and their JSON for the log."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(slots=True)
class Counters:
    """What happened since the process started. Plain additions by the thread that runs the loop."""

    connections_accepted: int = 0
    connections_refused: int = 0  # over max_connections, or for want of memory
    accept_pauses: int = 0  # for want of descriptors or memory
    connections_displaced: int = 0  # of strangers, or over a user's max_tunnels: closed to make room for a new one
    handshakes_completed: int = 0
    handshakes_failed: int = 0
    hellos_not_tried: int = 0  # too many had failed from the same address
    fallbacks: int = 0  # connections given to the web server
    tunnels_opened: int = 0
    tunnels_lost: int = 0  # ended without CLOSE
    protocol_errors: int = 0
    streams_opened: int = 0
    streams_refused: int = 0
    streams_reset: int = 0
    streams_shed: int = 0  # reset because memory for waiting bytes was used up
    bytes_into_tunnels: int = 0  # payload
    bytes_out_of_tunnels: int = 0  # payload
    tunnels_limited: int = 0  # closed at once: over a user's max_tunnels
    streams_limited: int = 0  # refused: over a user's max_streams, dials_per_s or monthly_bytes
    dials_delayed: int = 0  # by a user's dials_per_s
    reads_delayed: int = 0  # by a user's bytes_per_s

    def as_dict(self) -> dict[str, int]:
        """Every counter by name."""
        return dataclasses.asdict(self)

    def with_all(self, others: Iterable[Counters]) -> Counters:
        """The sum of these and others."""
        # Of ten thousand users at once: while the loop stands still, no dictionary is made of each.
        columns = zip(_values(self), *map(_values, others), strict=True)
        return Counters(*map(sum, columns))


_values: Final = operator.attrgetter(*(field.name for field in dataclasses.fields(Counters)))


def statistics_json(counters: Counters, pools: Mapping[str, Any], gauges: Mapping[str, int]) -> str:
    """One line of JSON: ``counters``, ``pools`` (each a dataclass of figures) and ``gauges``."""
    return json.dumps(
        {
            "counters": counters.as_dict(),
            "pools": {name: dataclasses.asdict(figures) for name, figures in pools.items()},
            "gauges": dict(gauges),
        }
    )

"""reflex.metrics: every figure, as JSON."""

from __future__ import annotations

import dataclasses
import json

from reflex.metrics import Counters, statistics_json
from reflex.pool import BufferPool, PoolStatistics

GAUGES = {"connections": 3, "tunnels": 1}


def counters() -> Counters:
    """Counters of which each has another value."""
    made = Counters()
    for value, field in enumerate(dataclasses.fields(made), 1):
        setattr(made, field.name, value)
    return made


def two_pools() -> dict[str, PoolStatistics]:
    """Figures of a pool that was used and of one that was not."""
    used = BufferPool(76, 4, preallocate=1)
    for buffer in [used.acquire(), used.acquire()]:
        used.release(buffer)
    return {"client_hello": used.statistics(), "2048": BufferPool(2_048, 1).statistics()}


def test_counters_start_at_nothing() -> None:
    assert set(Counters().as_dict().values()) == {0}
    assert list(Counters().as_dict()) == [field.name for field in dataclasses.fields(Counters)]


def test_counters_add_up() -> None:
    one, two = counters(), counters()
    total = one.with_all([two, counters()])
    assert total.as_dict() == {name: 3 * value for name, value in two.as_dict().items()}
    assert one == two
    assert one.with_all([]) == one


def test_json_is_one_line_that_holds_every_figure() -> None:
    pools = two_pools()
    line = statistics_json(counters(), pools, GAUGES)
    assert "\n" not in line
    assert json.loads(line) == {
        "counters": counters().as_dict(),
        "pools": {name: dataclasses.asdict(figures) for name, figures in pools.items()},
        "gauges": GAUGES,
    }

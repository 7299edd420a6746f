"""reflex.metrics: the same figures as JSON and as Prometheus text."""

from __future__ import annotations

import dataclasses
import json
import re

from reflex.metrics import Counters, prometheus_text, statistics_json
from reflex.pool import BufferPool, PoolStatistics

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{pool="([^"\\\n]*)"\})? (\S+)')
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


def families(text: str) -> dict[str, tuple[str, dict[str | None, float]]]:
    """A reader of the text format: kind and samples by name; every sample belongs to the TYPE line above it."""
    read: dict[str, tuple[str, dict[str | None, float]]] = {}
    name = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            _, word, name, kind = line.split(" ")
            assert word == "TYPE"
            assert name not in read
            read[name] = (kind, {})
            continue
        match = SAMPLE.fullmatch(line)
        assert match
        assert match[1] == name
        assert match[2] not in read[name][1]
        read[name][1][match[2]] = float(match[3])
    return read


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


def test_prometheus_text_holds_every_figure_once_below_its_type() -> None:
    pools = two_pools()
    expected: dict[str, tuple[str, dict[str | None, float]]] = {}
    for name, value in counters().as_dict().items():
        expected[f"reflex_{name}_total"] = ("counter", {None: value})
    for name, value in GAUGES.items():
        expected[f"reflex_{name}"] = ("gauge", {None: value})
    for field in dataclasses.fields(PoolStatistics):
        values: dict[str | None, float] = {name: getattr(figures, field.name) for name, figures in pools.items()}
        expected[f"reflex_pool_{field.name}"] = ("gauge", values)
    assert families(prometheus_text(counters(), pools, GAUGES)) == expected


def test_a_known_prometheus_text() -> None:
    text = prometheus_text(Counters(fallbacks=7), {}, {"tunnels": 2})
    assert "# TYPE reflex_fallbacks_total counter\nreflex_fallbacks_total 7\n" in text
    assert text.endswith("# TYPE reflex_tunnels gauge\nreflex_tunnels 2\n")


def test_without_pools_and_gauges_there_are_only_counters() -> None:
    read = families(prometheus_text(Counters(), {}, {}))
    assert {kind for kind, _ in read.values()} == {"counter"}
    assert len(read) == len(dataclasses.fields(Counters))
    assert json.loads(statistics_json(Counters(), {}, {}))["pools"] == {}

"""Coroutines as tests, on whichever event loop, and what they wait for: events, never times.

A test of this kind is a coroutine under :func:`in_loop`. :func:`until` is for what has no event of its own; it gives
up after DEADLINE_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, ParamSpec

import pytest
import uvloop

from reflex.loop import DirectLoop

P = ParamSpec("P")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]

DEADLINE_S: Final = 20.0  # for what takes milliseconds on an idle machine
POLL_S: Final = 0.001

# For tests that run on the daemons' loop and on another, by the fixture each_loop; all others run on asyncio's.
LOOPS: Final = (pytest.param(DirectLoop, id="direct"), pytest.param(uvloop.new_event_loop, id="uvloop"))
_factory: LoopFactory = asyncio.new_event_loop


@contextlib.contextmanager
def loops_from(factory: LoopFactory) -> Iterator[None]:
    """While this is open, :func:`in_loop` runs its tests on loops of this kind."""
    global _factory  # noqa: PLW0603 - pytest calls the tests, and hands them nothing that they did not ask for
    old, _factory = _factory, factory
    try:
        yield
    finally:
        _factory = old


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a coroutine function a test. It fails as well where a callback of the loop has raised."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        errors: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
            await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=_factory) as runner:
            runner.run(main())
        assert not errors, errors

    return run


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what it looks at tells nobody of its changes
            await asyncio.sleep(POLL_S)


async def turns(count: int = 3) -> None:
    """Let the loop turn so many times: what was due is done then."""
    for _ in range(count):
        await asyncio.sleep(0)

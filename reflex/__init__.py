"""Reflex: an encrypted framed-tunnel proxy.

The public names of the library are those of :mod:`reflex.protocol` and :mod:`reflex.pool`;
``docs/protocol.md`` shows two sessions driven in memory.
"""

__version__ = "0.1.0"

"""Sockets and the event loop: what moves the protocol's bytes."""

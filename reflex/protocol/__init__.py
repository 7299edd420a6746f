"""The wire protocol: bytes in, bytes out. No sockets, no asyncio, no clock, no randomness of its own."""

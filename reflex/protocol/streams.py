"""The life of a stream: one transition table for both halves (docs/protocol.md, section 5, "Streams").

A stream is OPENING from OPEN to OPENED; its opener may send, and even finish, before the answer.
Each direction ends by DATA_FIN; both ended, or a RESET either way, is the end of the stream. The
table knows both roles: who opened a stream never sends OPENED on it, who was asked never receives one.

States and events are plain ints, since the table is asked for every frame.
"""

from __future__ import annotations

from typing import Any, Final

from reflex.errors import StreamStateError
from reflex.protocol.window import ReceiveWindow, SendWindow
from reflex.protocol.wire import STREAM_WINDOW, Network

# Where a stream can be. "LOCAL_DONE": this side has sent its last; "REMOTE_DONE": the peer has.
CALLING: Final = 0  # this side sent OPEN
CALLING_LOCAL_DONE: Final = 1
CALLED: Final = 2  # the peer sent OPEN
CALLED_REMOTE_DONE: Final = 3
OPEN: Final = 4
LOCAL_DONE: Final = 5
REMOTE_DONE: Final = 6
CLOSED: Final = 7

UNANSWERED: Final = frozenset({CALLED, CALLED_REMOTE_DONE})

STATE_NAMES: Final = (
    "calling",
    "calling, sending ended",
    "called",
    "called, receiving ended",
    "open",
    "open, sending ended",
    "open, receiving ended",
    "closed",
)

# What can happen to it.
SEND_OPENED: Final = 0
SEND_REFUSAL: Final = 1
SEND_DATA: Final = 2
SEND_FIN: Final = 3
SEND_RESET: Final = 4
RECEIVE_OPENED: Final = 5
RECEIVE_REFUSAL: Final = 6
RECEIVE_DATA: Final = 7
RECEIVE_FIN: Final = 8
RECEIVE_RESET: Final = 9

EVENT_NAMES: Final = (
    "send OPENED",
    "refuse",
    "send DATA",
    "send DATA_FIN",
    "send RESET",
    "receive OPENED",
    "receive a refusal",
    "receive DATA",
    "receive DATA_FIN",
    "receive RESET",
)

TRANSITIONS: Final = {
    (CALLING, SEND_DATA): CALLING,
    (CALLING, SEND_FIN): CALLING_LOCAL_DONE,
    (CALLING, SEND_RESET): CLOSED,
    (CALLING, RECEIVE_OPENED): OPEN,
    (CALLING, RECEIVE_REFUSAL): CLOSED,
    (CALLING, RECEIVE_RESET): CLOSED,
    (CALLING_LOCAL_DONE, SEND_RESET): CLOSED,
    (CALLING_LOCAL_DONE, RECEIVE_OPENED): LOCAL_DONE,
    (CALLING_LOCAL_DONE, RECEIVE_REFUSAL): CLOSED,
    (CALLING_LOCAL_DONE, RECEIVE_RESET): CLOSED,
    (CALLED, SEND_OPENED): OPEN,
    (CALLED, SEND_REFUSAL): CLOSED,
    (CALLED, SEND_RESET): CLOSED,
    (CALLED, RECEIVE_DATA): CALLED,
    (CALLED, RECEIVE_FIN): CALLED_REMOTE_DONE,
    (CALLED, RECEIVE_RESET): CLOSED,
    (CALLED_REMOTE_DONE, SEND_OPENED): REMOTE_DONE,
    (CALLED_REMOTE_DONE, SEND_REFUSAL): CLOSED,
    (CALLED_REMOTE_DONE, SEND_RESET): CLOSED,
    (CALLED_REMOTE_DONE, RECEIVE_RESET): CLOSED,
    (OPEN, SEND_DATA): OPEN,
    (OPEN, SEND_FIN): LOCAL_DONE,
    (OPEN, SEND_RESET): CLOSED,
    (OPEN, RECEIVE_DATA): OPEN,
    (OPEN, RECEIVE_FIN): REMOTE_DONE,
    (OPEN, RECEIVE_RESET): CLOSED,
    (LOCAL_DONE, SEND_RESET): CLOSED,
    (LOCAL_DONE, RECEIVE_DATA): LOCAL_DONE,
    (LOCAL_DONE, RECEIVE_FIN): CLOSED,
    (LOCAL_DONE, RECEIVE_RESET): CLOSED,
    (REMOTE_DONE, SEND_DATA): REMOTE_DONE,
    (REMOTE_DONE, SEND_FIN): CLOSED,
    (REMOTE_DONE, SEND_RESET): CLOSED,
    (REMOTE_DONE, RECEIVE_RESET): CLOSED,
}

# The hot questions, answered once from the table.
MAY_SEND: Final = tuple((state, SEND_DATA) in TRANSITIONS for state in range(CLOSED + 1))
MAY_RECEIVE: Final = tuple((state, RECEIVE_DATA) in TRANSITIONS for state in range(CLOSED + 1))


class Stream:
    """One stream of a session. Made by the session; ``owner`` is the application's to use.

    ``held_bytes`` is what was handed to the application and not yet reported back as consumed;
    ``hurried_bytes`` what there was credit for since the last pause, in either direction, and ``hurried_s`` when
    there was credit last.
    """

    __slots__ = (
        "grown_bytes",
        "held_bytes",
        "hurried_bytes",
        "hurried_s",
        "id",
        "is_tcp",
        "network",
        "owner",
        "receive_window",
        "send_window",
        "state",
    )

    def __init__(self, stream_id: int, state: int, network: Network) -> None:
        self.id = stream_id
        self.state = state
        self.network = network
        self.is_tcp = network == Network.TCP
        self.send_window = SendWindow(STREAM_WINDOW)
        self.receive_window = ReceiveWindow(STREAM_WINDOW)
        self.held_bytes = 0
        self.hurried_bytes = 0
        self.hurried_s = 0.0
        self.grown_bytes = 0
        self.owner: Any = None

    def __repr__(self) -> str:
        return f"<Stream {self.id}, {STATE_NAMES[self.state]}>"

    @property
    def is_closed(self) -> bool:
        """Whether both directions have ended."""
        return self.state == CLOSED

    @property
    def may_send(self) -> bool:
        """Whether DATA may still be sent."""
        return MAY_SEND[self.state]

    def can(self, event: int) -> bool:
        """Whether the event fits the stream's state."""
        return (self.state, event) in TRANSITIONS

    def move(self, event: int) -> None:
        """Take the transition.

        Raises:
            StreamStateError: the event does not fit the state, which stays as it is.
        """
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise StreamStateError(self.id, STATE_NAMES[self.state], EVENT_NAMES[event])
        self.state = state

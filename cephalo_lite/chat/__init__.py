"""Asking a model: one question, a batch, a stream, a conversation."""

from .ask import Answer, ask
from .conversation import Chat
from .sampling import Sampling
from .stream import stream

__all__ = ["Answer", "Chat", "Sampling", "ask", "stream"]

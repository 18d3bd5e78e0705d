"""Which expert saw which token: recorded, counted, drawn."""

from .record import RoutingTrace
from .recording import trace_routing, tracing

__all__ = ["RoutingTrace", "trace_routing", "tracing"]

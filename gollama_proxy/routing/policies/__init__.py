"""How a worker is picked from the available ones: one policy, one file."""

from gollama_proxy.routing.policies.base import Policy
from gollama_proxy.routing.policies.round_robin import RoundRobin

__all__ = ["Policy", "RoundRobin"]

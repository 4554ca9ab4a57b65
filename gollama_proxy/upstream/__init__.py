"""Connections to workers, and the requests that the hub itself sends to them."""

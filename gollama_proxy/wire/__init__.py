"""Formats on the wire: pure functions, no sockets."""

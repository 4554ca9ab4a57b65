"""Connections, routes and permissions of clients."""

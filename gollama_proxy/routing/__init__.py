"""Decisions: no sockets, no tasks, no wall clock."""

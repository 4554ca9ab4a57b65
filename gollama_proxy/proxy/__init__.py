"""One request, from its first byte to its one outcome."""

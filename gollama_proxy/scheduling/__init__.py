"""Which request is next, and which worker gets it."""

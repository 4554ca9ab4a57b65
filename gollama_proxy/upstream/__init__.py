"""What touches workers: connections, relayed bytes, health."""

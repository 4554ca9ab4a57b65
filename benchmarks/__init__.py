"""What the hub costs, measured beside other proxies: `python -m benchmarks.cost`."""

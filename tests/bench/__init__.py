"""Benchmarks of the daemon and its peers: see ``scripts/bench --help``."""

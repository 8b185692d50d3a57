"""Benchmarks against peers, through the front-end without a VM: see ``scripts/bench --help``."""

"""Simulated servers with faults by name."""

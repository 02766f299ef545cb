"""Simulated robots, one simulator per file."""

"""Benchmarks, their baselines and their committed results."""

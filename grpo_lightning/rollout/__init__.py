"""Engines, collection of rollouts, and packing."""

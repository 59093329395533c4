"""Measurements: what things cost, and what the doctor finds. Run from the repository's root."""

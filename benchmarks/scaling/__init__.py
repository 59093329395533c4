"""A model of an epoch on larger machines: which phase bounds it, and what to buy next. Arithmetic, not measurement."""

"""Engines: what computes tokens. `base` is what the node expects of one; the rest are drivers."""

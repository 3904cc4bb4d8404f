"""Who is in the pool, and whether it still reports."""

"""What the pool remembers: nodes, instances, routes and usage, in SQLite or any SQL database."""

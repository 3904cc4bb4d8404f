"""Which node serves a request. Pure: a frozen snapshot and a request in, a decision out."""

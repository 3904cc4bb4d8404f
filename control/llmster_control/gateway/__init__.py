"""The request path of the pool: choose a route, relay, recover. No database here."""

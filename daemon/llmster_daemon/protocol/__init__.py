"""Wire types the node speaks: frozen pydantic models that import nothing else of ours."""

"""Hand-over of a KV cache: how it is laid out, framed and checked."""

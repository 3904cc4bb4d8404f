"""llama.cpp over the low-level API of llama-cpp-python."""

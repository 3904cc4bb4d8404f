"""The engine process: one context, many sequences, one owner.

main.py       starts, loads, says why it failed
ipc.py        frames on the Unix socket to the node daemon
loop.py       owner of the context: inbox -> schedule -> compute -> sample -> events
scheduler.py  pure: which tokens of which sequences go into the next batch
text.py       tokens to text: UTF-8 borders and stop strings
kvport.py     hand-over: pushes KV ranges to, and takes them from, other engines
backend.py    what a model must offer (llamacpp.backend, fake)
"""

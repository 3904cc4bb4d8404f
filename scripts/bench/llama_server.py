"""llama.cpp's own server (PyPI `xllamacpp`), to compare with: prints its address and serves.

python scripts/bench/llama_server.py MODEL THREADS SLOTS CONTEXT
"""

import sys
import time

import xllamacpp


def main() -> None:
    """Run the server."""
    model, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = context
    params.n_parallel = slots
    params.n_batch = params.n_ubatch = 512
    params.kv_unified = True
    params.cont_batching = True
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port = 0
    params.verbosity = 0
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()

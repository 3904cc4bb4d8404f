"""Sampling of one sequence with llama.cpp's own sampler chain."""

import ctypes
from typing import Any

import llama_cpp
import numpy as np

from ..worker.backend import Logits


class Candidates:
    """The vocabulary as llama.cpp's samplers take it; one buffer, used by one row at a time."""

    def __init__(self, vocabulary: int) -> None:
        record = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        self.rows = np.zeros(vocabulary, dtype=record)
        self.ids = np.arange(vocabulary, dtype=np.int32)
        self.array = llama_cpp.llama_token_data_array(
            data=self.rows.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data)),
            size=vocabulary,
            selected=-1,
            sorted=False,
        )
        self.pointer = ctypes.byref(self.array)

    def fill(self, logits: Logits) -> None:
        """Set every candidate anew: samplers reorder and cut the array."""
        self.rows["id"] = self.ids
        self.rows["logit"] = logits
        self.rows["p"] = 0.0
        self.array.size = len(self.ids)
        self.array.selected = -1
        self.array.sorted = False


class GreedySampler:
    """The likeliest token; the lowest id among equals."""

    def sample(self, logits: Logits) -> int:
        """The next token."""
        return int(logits.argmax())

    def close(self) -> None:
        """Nothing to free."""


class ChainSampler:
    """top-k, top-p, min-p, temperature, then a draw from the seeded generator."""

    def __init__(self, candidates: Candidates, params: dict[str, Any]) -> None:
        self._candidates = candidates
        chain_params = llama_cpp.llama_sampler_chain_default_params()
        chain_params.no_perf = True
        self._chain = llama_cpp.llama_sampler_chain_init(chain_params)
        for sampler in (
            llama_cpp.llama_sampler_init_top_k(int(params["top_k"])),
            llama_cpp.llama_sampler_init_top_p(float(params["top_p"]), 1),
            llama_cpp.llama_sampler_init_min_p(float(params["min_p"]), 1),
            llama_cpp.llama_sampler_init_temp(float(params["temperature"])),
            llama_cpp.llama_sampler_init_dist(int(params["seed"]) & 0xFFFFFFFF),
        ):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, logits: Logits) -> int:
        """The next token, accepted into the chain."""
        candidates = self._candidates
        candidates.fill(logits)
        llama_cpp.llama_sampler_apply(self._chain, candidates.pointer)
        token = int(candidates.rows["id"][candidates.array.selected])
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the chain and the samplers in it."""
        if self._chain is not None:
            llama_cpp.llama_sampler_free(self._chain)
            self._chain = None

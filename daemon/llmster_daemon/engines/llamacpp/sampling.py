"""Sampling of one sequence with llama.cpp's own samplers."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from ..base import GenerateParams
from ..worker.backend import Logits, RequestError

MIROSTAT_M = 100
"""Candidates that mirostat 1 estimates from; the value of its paper."""

MAX_GRAMMAR_DEPTH = 2000
"""llama.cpp's parser calls itself for every group; ten times as many overflow the stack."""


class Candidates:
    """The vocabulary as llama.cpp's samplers take it; one buffer, used by one row at a time."""

    def __init__(self, vocabulary: int) -> None:
        record = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        self.rows = np.zeros(vocabulary, dtype=record)
        self.ids = np.arange(vocabulary, dtype=np.int32)
        self._data = self.rows.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self.array = llama_cpp.llama_token_data_array(
            data=self._data,
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
        self._reset(len(self.ids))

    def only(self, token: int) -> None:
        """Set one candidate."""
        self.rows[0] = (token, 1.0, 0.0)
        self._reset(1)

    @property
    def selected(self) -> int:
        """The token that the last chain chose."""
        # Not through `rows`: XTC cuts the front off by moving the pointer.
        return int(self.array.data[self.array.selected].id)

    def _reset(self, size: int) -> None:
        self.array.data = self._data
        self.array.size = size
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
    """llama.cpp's chain in llama-server's order, and its grammar beside it.

    bias, penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature, draw; or mirostat.
    """

    def __init__(
        self, vocab: Any, candidates: Candidates, params: GenerateParams, prompt: Sequence[int]
    ) -> None:
        """Raises RequestError for a grammar that can't be parsed."""
        self._candidates = candidates
        self._grammar = None
        if params.grammar is not None:
            if _depth(params.grammar) > MAX_GRAMMAR_DEPTH:
                raise RequestError("bad_grammar", "the grammar's groups are nested too deeply")
            # A failed grammar is a NULL pointer object, which is false but not None.
            grammar = llama_cpp.llama_sampler_init_grammar(vocab, params.grammar.encode(), b"root")
            if not grammar:
                raise RequestError("bad_grammar", "the grammar can't be parsed (GBNF, rule 'root')")
            self._grammar = grammar
        chain_params = llama_cpp.llama_sampler_chain_default_params()
        chain_params.no_perf = True
        self._chain = llama_cpp.llama_sampler_chain_init(chain_params)
        for sampler in _samplers(vocab, len(candidates.ids), params):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)
        if params.looks_back:
            for token in prompt[-max(params.repeat_last_n, params.dry_last_n) :]:
                llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self, logits: Logits) -> int:
        """The next token, accepted into the chain and the grammar."""
        candidates = self._candidates
        candidates.fill(logits)
        llama_cpp.llama_sampler_apply(self._chain, candidates.pointer)
        token = candidates.selected
        if self._grammar is not None:
            # Most tokens fit, and testing one costs a hundredth of testing the vocabulary.
            if not self._fits(token):
                candidates.fill(logits)
                llama_cpp.llama_sampler_apply(self._grammar, candidates.pointer)
                llama_cpp.llama_sampler_apply(self._chain, candidates.pointer)
                token = candidates.selected
                if not self._fits(token):
                    raise RequestError("grammar_stuck", "the grammar allows no token here")
            llama_cpp.llama_sampler_accept(self._grammar, token)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the chain and the samplers in it."""
        if self._chain is not None:
            llama_cpp.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar is not None:
            llama_cpp.llama_sampler_free(self._grammar)
            self._grammar = None

    def _fits(self, token: int) -> bool:
        self._candidates.only(token)
        llama_cpp.llama_sampler_apply(self._grammar, self._candidates.pointer)
        return bool(np.isfinite(self._candidates.rows["logit"][0]))


def _depth(grammar: str) -> int:
    """How deeply groups are nested, at most: parentheses in literals count too."""
    depth = deepest = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _samplers(vocab: Any, vocabulary: int, params: GenerateParams) -> list[Any]:
    """The samplers that these parameters need, in order."""
    # The last of the 32-bit numbers asks llama.cpp for a random seed.
    seed = params.seed % 0xFFFFFFFF
    found = []
    if params.logit_bias:
        bias = (llama_cpp.llama_logit_bias * len(params.logit_bias))()
        for entry, (token, value) in zip(bias, params.logit_bias, strict=True):
            entry.token, entry.bias = token, value
        found.append(llama_cpp.llama_sampler_init_logit_bias(vocabulary, len(bias), bias))
    if params.penalises:
        found.append(
            llama_cpp.llama_sampler_init_penalties(
                vocabulary,
                params.repeat_last_n,
                params.repeat_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        )
    if params.dry_multiplier > 0:
        breakers = [text.encode() for text in params.dry_breakers]
        found.append(
            llama_cpp.llama_sampler_init_dry(
                vocab,
                params.dry_multiplier,
                params.dry_base,
                params.dry_allowed_length,
                params.dry_last_n,
                (ctypes.c_char_p * len(breakers))(*breakers),
                len(breakers),
            )
        )
    if params.temperature <= 0:
        return [*found, llama_cpp.llama_sampler_init_greedy()]
    if params.mirostat:
        found.append(llama_cpp.llama_sampler_init_temp(params.temperature))
        tau, eta = params.mirostat_tau, params.mirostat_eta
        if params.mirostat == 1:
            mirostat = llama_cpp.llama_sampler_init_mirostat(vocabulary, seed, tau, eta, MIROSTAT_M)
        else:
            mirostat = llama_cpp.llama_sampler_init_mirostat_v2(seed, tau, eta)
        return [*found, mirostat]
    if params.top_k > 0:
        found.append(llama_cpp.llama_sampler_init_top_k(params.top_k))
    if params.typical_p < 1:
        found.append(llama_cpp.llama_sampler_init_typical(params.typical_p, 1))
    if params.top_p < 1:
        found.append(llama_cpp.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        found.append(llama_cpp.llama_sampler_init_min_p(params.min_p, 1))
    if params.xtc_probability > 0:
        xtc = (params.xtc_probability, params.xtc_threshold, 1, seed)
        found.append(llama_cpp.llama_sampler_init_xtc(*xtc))
    found.append(llama_cpp.llama_sampler_init_temp(params.temperature))
    found.append(llama_cpp.llama_sampler_init_dist(seed))
    return found

"""Transformers models with each attention function, as functions without arguments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from peers import Call, Peer, Unsupported

if TYPE_CHECKING:
    import numpy as np

TOKENS = 8  # one call generates this many


@dataclass(frozen=True)
class Case:
    """One row: a model with random weights that reads a prompt or generates tokens after it."""

    name: str
    family: str
    prompt: int
    generates: bool = False
    dtype: str = "float32"

    bound = None  # no share of the peak: most of the time is not attention

    def as_dict(self) -> dict:
        return asdict(self)


_SMALL = {  # SmolLM2-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_FEWER = {**_SMALL, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = {
    "SmolLM2": ("Llama", _SMALL),
    "Gemma 2": ("Gemma2", {**_FEWER, "head_dim": 64, "sliding_window": 512}),
    "gpt-oss": (
        "GptOss",
        {**_FEWER, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
}

CASES = [
    Case("SmolLM2 bf16, prompt 2048", "SmolLM2", 2048, dtype="bfloat16"),
    Case("SmolLM2 bf16, prompt 512", "SmolLM2", 512, dtype="bfloat16"),
    Case("SmolLM2 f32, prompt 2048", "SmolLM2", 2048),
    Case("SmolLM2 f32, prompt 512", "SmolLM2", 512),
    Case("SmolLM2 bf16, a token after 2048", "SmolLM2", 2048, True, "bfloat16"),
    Case("SmolLM2 f32, a token after 2048", "SmolLM2", 2048, True),
    Case("Gemma 2 f32, prompt 2048", "Gemma 2", 2048),
    Case("gpt-oss f32, prompt 2048", "gpt-oss", 2048),
]

# Targets with two threads: how many times as fast as with "sdpa".
BARS: dict[str, dict[str, float]] = {
    "SmolLM2 bf16, prompt 2048": {"sdpa": 1.6},
    "SmolLM2 bf16, prompt 512": {"sdpa": 1.35},
    "SmolLM2 f32, prompt 2048": {"sdpa": 1.15},
    "SmolLM2 f32, prompt 512": {"sdpa": 0.97},
    "SmolLM2 bf16, a token after 2048": {"sdpa": 1.5},
    "SmolLM2 f32, a token after 2048": {"sdpa": 0.97},
}
# How much logits may differ, relative to the largest; bfloat16 rounds after each step of 30 layers.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}


def make_peer(implementation: str, case: Case, threads: int) -> dict[str, Call]:
    import numattn.transformers
    import torch
    import transformers

    torch.set_num_threads(threads)
    numattn.transformers.register()
    family, options = FAMILIES[case.family]
    if implementation == "sdpa" and family in ("Gemma2", "GptOss"):
        raise Unsupported("this model does not support sdpa")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**options),
        attn_implementation=implementation,
        dtype=getattr(torch, case.dtype),
    ).eval()
    ids = torch.randint(0, options["vocab_size"], (1, case.prompt + TOKENS))
    read = partial(model, logits_to_keep=1)

    @torch.inference_mode()
    def prompt() -> np.ndarray:
        return read(ids[:, : case.prompt], use_cache=False).logits.float().numpy()

    cache = transformers.DynamicCache(config=model.config)
    if case.generates:
        with torch.inference_mode():
            read(ids[:, : case.prompt], cache=cache)

    @torch.inference_mode()
    def generate() -> np.ndarray:
        for i in range(case.prompt, case.prompt + TOKENS):
            logits = read(ids[:, i : i + 1], cache=cache).logits
        cache.crop(-TOKENS)
        return logits.float().numpy()

    return {implementation: generate if case.generates else prompt}


PEERS: dict[str, Peer] = {name: partial(make_peer, name) for name in ("numattn", "sdpa", "eager")}

"""Let transformers models read and write, with numattn's attention and with PyTorch's.

Without arguments, the program makes small models of three families with random weights, and
downloads nothing. Pass the folder of a real model and its tokenizer to let it continue a text:

    python examples/transformers_generate.py --model path/to/model --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import time

import numattn.transformers
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
)

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "eos_token_id": None,  # no end of text: all models write the same number of tokens
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": LlamaConfig(**SMALL),
    "Gemma 2 (softcap, windows)": Gemma2Config(**SMALL, sliding_window=256),
    "gpt-oss (sinks, windows)": GptOssConfig(
        **SMALL, sliding_window=128, num_local_experts=4, num_experts_per_tok=1
    ),
}


def generate(model, inputs, new_tokens, repeats=3):
    """Return the tokens, the seconds to read the prompt, and the seconds per written token."""
    options = {"do_sample": False, "pad_token_id": 0}
    seconds = {}
    for count in (1, new_tokens):
        for _ in range(repeats):
            begin = time.perf_counter()
            tokens = model.generate(**inputs, max_new_tokens=count, **options)
            taken = time.perf_counter() - begin
            seconds[count] = min(taken, seconds.get(count, taken))
    return tokens, seconds[1], (seconds[new_tokens] - seconds[1]) / (new_tokens - 1)


def compare(name, model, inputs, new_tokens):
    """Let a model write with numattn's and with PyTorch's attention; print tokens per second."""
    # Gemma 2 and gpt-oss do not use PyTorch's attention function, but products and a softmax.
    other = "sdpa" if model._supports_sdpa else "eager"
    results = {}
    for implementation in (other, "numattn"):
        model.set_attn_implementation(implementation)
        results[implementation] = generate(model, inputs, new_tokens)
    length = inputs["input_ids"].shape[1]
    print(f"{name}: {length} tokens read, {new_tokens} written")
    for implementation, (_, reading, writing) in results.items():
        # A difference of two times; noise can make a short one negative.
        rate = f"{1 / writing:6.1f} tokens/s" if writing > 0 else "too fast to tell"
        print(f"  {implementation:8} reads {length / reading:6.0f} tokens/s, writes {rate}")
    (theirs, _, _), (ours, _, _) = results[other], results["numattn"]
    print(f"  the same tokens: {torch.equal(ours, theirs)}")
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model with its tokenizer")
    parser.add_argument(
        "--prompt",
        default="The history of attention begins with",
        help="text that a real model continues",
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of the random prompts")
    parser.add_argument("--new-tokens", type=int, default=32, help="how many to write, at least 2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if arguments.new_tokens < 2:
        parser.error(f"--new-tokens: got {arguments.new_tokens}, expected at least 2")
    dtype = getattr(torch, arguments.dtype)
    numattn.transformers.register()
    torch.manual_seed(0)
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, local_files_only=True, dtype=dtype
        )
        inputs = dict(tokenizer(arguments.prompt, return_tensors="pt"))
        tokens = compare(arguments.model, model, inputs, arguments.new_tokens)
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
        return
    for name, config in FAMILIES.items():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.randint(1, SMALL["vocab_size"], (1, arguments.length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        compare(name, model, inputs, arguments.new_tokens)


if __name__ == "__main__":
    main()

"""Promise: models of transformers give the same with ``attn_implementation="numattn"`` as with
"eager": results, generated tokens, gradients, weights, whatever the mask.

Tiny models with random weights; without torch and transformers, all of it is skipped.
"""

import ast
import copy
import pickle
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numattn.torch  # noqa: E402
import numattn.transformers  # noqa: E402
import tiny_models  # noqa: E402
from numattn import _transformers_masks, _transformers_structures  # noqa: E402
from numattn._transformers_masks import StructuredMask  # noqa: E402
from transformers import masking_utils  # noqa: E402

# What float32 does to two layers, as a share of the largest number.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _registered():
    numattn.transformers.register()
    transformers.utils.logging.set_verbosity_error()


class Spy:
    """Counts the calls of attention, and keeps their options."""

    def __init__(self, monkeypatch):
        self.calls = []
        attention = numattn.torch.attention

        def spied(q, k, v, **options):
            self.calls.append({**options, "shapes": (tuple(q.shape), tuple(k.shape))})
            return attention(q, k, v, **options)

        monkeypatch.setattr(numattn.torch, "attention", spied)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    largest = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= tolerance * largest


def with_both(model, compute):
    """Return what a model gives with numattn, and with "eager"."""
    model.set_attn_implementation("eager")
    theirs = compute(model)
    model.set_attn_implementation("numattn")
    return compute(model), theirs


# ---- language models ---------------------------------------------------------------------------


def generated(model, batch, **options):
    """Return the logits of each new token."""
    result = model.generate(
        **batch,
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(result.logits)


WAYS = {
    "forward": lambda model, batch: model(**batch).logits[batch["attention_mask"].bool()],
    "greedy": generated,
    "static cache": lambda model, batch: generated(model, batch, cache_implementation="static"),
    "beams": lambda model, batch: generated(model, batch, num_beams=3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", tiny_models.DECODERS)
@torch.no_grad()
def test_language_models(family, padding, way, spy):
    batch = tiny_models.tokens(padding)
    ours, theirs = with_both(tiny_models.decoder(family), lambda model: WAYS[way](model, batch))
    assert_close(ours, theirs)
    assert spy.calls


@pytest.mark.parametrize("way", ["forward", "greedy"])
@pytest.mark.parametrize("family", tiny_models.DECODERS_WITHOUT_INTERFACE)
@torch.no_grad()
def test_models_that_compute_attention_themselves(family, way, monkeypatch):
    """They get the masks of "eager", and a warning says so."""
    monkeypatch.setattr(_transformers_masks, "_seen", set())
    batch = tiny_models.tokens("left")
    model = tiny_models.decoder(family)
    theirs = WAYS[way](model, batch)
    model.config._attn_implementation = "numattn"
    with pytest.warns(UserWarning, match=f"{family}Config: this model does not use tr"):
        ours = WAYS[way](model, batch)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_16_bits(dtype):
    """The error is not larger than the one of "sdpa"."""
    batch = tiny_models.tokens("left", length=40)
    model = tiny_models.decoder("Mistral")
    model.set_attn_implementation("sdpa")
    exact = WAYS["forward"](model.double(), batch)
    model.to(dtype)
    errors = {}
    for name in ("numattn", "sdpa"):
        model.set_attn_implementation(name)
        found = WAYS["forward"](model, batch).double()
        errors[name] = float((found - exact).pow(2).mean())
    assert errors["numattn"] <= 1.05 * errors["sdpa"]


# ---- encoders, and pairs of encoder and decoder --------------------------------------------------


def floats_of(result, mask):
    """Return the float tensors of a result, without the positions of padding."""
    for name, x in result.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            yield x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x
        elif "attentions" in name:
            yield from x


@pytest.mark.parametrize("name", tiny_models.ENCODERS_AND_PAIRS)
@torch.no_grad()
def test_encoders_and_pairs(name, spy):
    batch = tiny_models.inputs(tiny_models.ENCODERS_AND_PAIRS[name][3])
    ours, theirs = with_both(tiny_models.encoder(name), lambda model: model(**batch))
    mask = batch.get("attention_mask")
    pairs = list(zip(floats_of(ours, mask), floats_of(theirs, mask), strict=True))
    assert pairs
    for found, wanted in pairs:
        assert_close(found, wanted)
    assert spy.calls


@pytest.mark.parametrize("name", ["T5", "UMT5", "BART", "Marian", "Whisper", "T5Gemma"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_pairs_generate(name, beams):
    batch = tiny_models.inputs(tiny_models.ENCODERS_AND_PAIRS[name][3])
    del batch["decoder_input_ids"]
    ours, theirs = with_both(
        tiny_models.encoder(name), lambda model: generated(model, batch, num_beams=beams)
    )
    assert_close(ours, theirs)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["BERT", "BERT with cross-attention", "ESM", "T5", "Whisper", "ViT"]
)
@torch.no_grad()
def test_weights_of_encoders(name):
    batch = tiny_models.inputs(tiny_models.ENCODERS_AND_PAIRS[name][3])
    ours, theirs = with_both(
        tiny_models.encoder(name), lambda model: model(**batch, output_attentions=True)
    )
    kinds = [kind for kind in theirs if "attentions" in kind and theirs[kind]]
    assert kinds
    for kind in kinds:
        for found, wanted in zip(ours[kind], theirs[kind], strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss", "Llama4Text"])
@torch.no_grad()
def test_weights_of_language_models(family):
    batch = tiny_models.tokens()
    ours, theirs = with_both(
        tiny_models.decoder(family), lambda model: model(**batch, output_attentions=True)
    )
    assert_close(ours.logits, theirs.logits)
    for found, wanted in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_weights_of_generated_tokens():
    batch = tiny_models.tokens("left")

    def weights(model):
        options = {"output_attentions": True, "return_dict_in_generate": True}
        return model.generate(
            **batch, max_new_tokens=3, do_sample=False, pad_token_id=0, **options
        ).attentions

    ours, theirs = with_both(tiny_models.decoder("Llama"), weights)
    for found, wanted in zip(ours[1:], theirs[1:], strict=True):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_weights_have_no_gradient():
    model = tiny_models.decoder("Llama")
    model.set_attn_implementation("numattn")
    result = model(**tiny_models.tokens(), output_attentions=True)
    result.logits.sum().backward()  # does not touch them
    result = model(**tiny_models.tokens(), output_attentions=True)
    with pytest.raises(RuntimeError, match="no gradient; use attn_implementation='eager'"):
        result.attentions[0].square().sum().backward()


# ---- training ------------------------------------------------------------------------------------


def gradients(model, batch):
    model.zero_grad()
    result = model(**batch)
    loss = result.loss if "labels" in batch else result[0][batch["attention_mask"].bool()].square()
    loss.mean().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


TRAINED = {
    **dict.fromkeys(["Llama", "Mistral", "Gemma2", "GptOss", "Llama4Text"], "decoder"),
    **dict.fromkeys(["BERT", "T5", "BART"], "encoder"),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients(name, recomputed):
    if TRAINED[name] == "decoder":
        model, batch = tiny_models.decoder(name), tiny_models.tokens("left")
    else:
        model = tiny_models.encoder(name)
        batch = tiny_models.inputs(tiny_models.ENCODERS_AND_PAIRS[name][3])
    if name != "BERT":
        # Padding predicts nothing, not even the first token.
        unpadded = batch["attention_mask"].cumsum(-1) > 1
        labels = batch["input_ids"].masked_fill(~unpadded, -100)
        batch["labels"] = batch.pop("decoder_input_ids", labels)
    model.train()
    for module in model.modules():  # without dropout, which no two ways share
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    if recomputed:
        model.activation_checkpointing_enable()
    ours, theirs = with_both(model, lambda model: gradients(model, batch))
    assert ours.keys() == theirs.keys()
    largest = max(float(x.abs().max()) for x in theirs.values())
    for key, wanted in theirs.items():
        error = float((ours[key] - wanted).abs().max())
        assert error <= 1e-4 * max(float(wanted.abs().max()), 1e-3 * largest), key


def test_dropout():
    """The same weights are dropped after the same seed, others without it."""
    model = tiny_models.decoder("Llama", attention_dropout=0.5)
    model.set_attn_implementation("numattn")
    model.train()

    def trained(seed):
        torch.manual_seed(seed)
        return gradients(
            model, {**tiny_models.tokens(), "labels": tiny_models.tokens()["input_ids"]}
        )

    first, again, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    model.eval()
    assert torch.equal(model(**tiny_models.tokens()).logits, model(**tiny_models.tokens()).logits)


# ---- compiled and exported models ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GptOss", "Llama4Text"])
@torch.no_grad()
def test_compiled_models(family):
    batch = tiny_models.tokens("left")
    model = tiny_models.decoder(family)
    theirs = WAYS["forward"](model, batch)
    model.set_attn_implementation("numattn")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(WAYS["forward"](compiled, {**batch, "use_cache": False}), theirs)


@torch.no_grad()
def test_compiled_generation():
    """With a static cache, and masks that are made outside of what is compiled."""
    batch = tiny_models.tokens("left")
    model = tiny_models.decoder("Llama")
    theirs = WAYS["static cache"](model, batch)
    model.set_attn_implementation("numattn")
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert_close(WAYS["static cache"](model, batch), theirs)


@torch.no_grad()
def test_exported_models():
    batch = {**tiny_models.tokens("left"), "use_cache": False}
    model = tiny_models.decoder("Llama")
    theirs = WAYS["forward"](model, batch)
    model.set_attn_implementation("numattn")
    exported = torch.export.export(model, (), batch, strict=False).module()
    assert_close(WAYS["forward"](exported, batch), theirs)


# ---- masks keep their structure ------------------------------------------------------------------


def refuse_dense(self):
    raise AssertionError("a mask became dense")


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GPT2", "OPT", "Llama4Text"])
@torch.no_grad()
def test_no_dense_masks(family, padding, spy, monkeypatch):
    monkeypatch.setattr(StructuredMask, "dense", refuse_dense)
    model = tiny_models.decoder(family)
    model.set_attn_implementation("numattn")
    model(**tiny_models.tokens(padding))
    for call in spy.calls:
        assert call["window"][1] == 0
        mask = call.get("mask")
        assert mask is None or mask.shape[:-1] == (mask.shape[0], 1, 1)
    if padding == "none":
        assert all(call.get("mask") is None for call in spy.calls)


@torch.no_grad()
def test_no_dense_masks_of_encoders(spy, monkeypatch):
    monkeypatch.setattr(StructuredMask, "dense", refuse_dense)
    for name in ("BERT", "ModernBERT", "T5Gemma"):
        model = tiny_models.encoder(name)
        model.set_attn_implementation("numattn")
        model(**tiny_models.inputs(tiny_models.ENCODERS_AND_PAIRS[name][3]))
    windows = {call.get("window") for call in spy.calls}
    assert {(3, 3), (None, 0), None} <= windows


@torch.no_grad()
def test_static_caches_are_read_as_far_as_they_are_filled(spy):
    model = tiny_models.decoder("Llama")
    model.set_attn_implementation("numattn")
    cache = transformers.StaticCache(model.config, max_cache_len=60)
    batch = tiny_models.tokens("left")
    model.generate(**batch, cache=cache, max_new_tokens=3, pad_token_id=0)
    lengths = [call["shapes"][1][1] for call in spy.calls if call["shapes"][0][1] == 1]
    assert lengths == [14, 14, 15, 15]
    threads = [call.get("num_threads") for call in spy.calls]
    assert threads == [None, None, 1, 1, 1, 1]  # few bytes for few queries


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "all": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "window of both sides": masking_utils.sliding_window_bidirectional_mask_function(3),
    "both windows": masking_utils.and_masks(
        masking_utils.sliding_window_overlay(5),
        masking_utils.sliding_window_bidirectional_overlay(2),
    ),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    "same chunks": masking_utils.chunked_causal_mask_function(5, torch.tensor([2, 2])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_structures_mean_what_the_functions_mean(name, rng):
    """Attention by structure is attention by the dense mask, wherever queries and keys begin."""
    for _ in range(30):
        q_length, kv_length = (int(x) for x in rng.integers(2, 20, 2))
        q_offset, kv_offset = (int(x) for x in rng.integers(0, 8, 2))
        padding = torch.from_numpy(rng.random((2, int(rng.integers(1, 30)))) < rng.choice([0.7, 2]))
        mask = _transformers_masks.make_mask(
            2, q_length, kv_length, q_offset, kv_offset, FUNCTIONS[name], padding
        )
        assert isinstance(mask, StructuredMask)
        dense = masking_utils.eager_mask(
            2, q_length, kv_length, q_offset, kv_offset, FUNCTIONS[name], padding
        )
        assert torch.equal(mask.dense(), dense)
        dense = dense == 0
        q, k, v = (
            torch.from_numpy(rng.standard_normal((2, heads, length, 8), dtype=np.float32))
            for heads, length in ((4, q_length), (2, kv_length), (2, kv_length))
        )
        module = torch.nn.Identity()
        ours, _ = numattn.transformers.attention_forward(module, q, k, v, mask)
        theirs, _ = numattn.transformers.attention_forward(module, q, k, v, dense)
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_unknown_functions_are_bools_of_all_pairs(rng):
    def every_second(batch, head, query, key):
        return (query - key) % 2 == 0

    both = masking_utils.and_masks(every_second, masking_utils.causal_mask_function)
    q = torch.from_numpy(rng.standard_normal((2, 4, 7, 8), dtype=np.float32))
    for function in (every_second, both, masking_utils.or_masks(*FUNCTIONS.values())):
        mask = _transformers_masks.make_mask(2, 7, 7, mask_function=function)
        dense = masking_utils.eager_mask(2, 7, 7, mask_function=function)
        assert torch.equal(mask.structure().pairs, dense == 0)
        assert torch.equal(mask.dense(), dense)
        ours, theirs = (
            numattn.transformers.attention_forward(torch.nn.Identity(), q, q, q, x)[0]
            for x in (mask, dense == 0)
        )
        assert torch.equal(ours, theirs)


def test_functions_that_a_release_changes_are_bools_of_all_pairs(monkeypatch):
    """What is known of a function is compared with the function."""

    def shorter(size):
        def inner(batch, head, query, key):
            return key >= query - size // 2

        return inner

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", shorter)
    _transformers_structures._known.cache_clear()
    try:
        mask = _transformers_masks.make_mask(2, 7, 7, mask_function=shorter(4))
    finally:
        _transformers_structures._known.cache_clear()
    assert mask.structure().pairs is not None


@torch.no_grad()
def test_packed_sequences(spy):
    """Positions that begin anew begin another sequence."""
    batch = {
        "input_ids": tiny_models.tokens()["input_ids"],
        "position_ids": torch.tensor([[*range(5), *range(8)]]),
        "use_cache": False,
    }
    ours, theirs = with_both(tiny_models.decoder("Llama"), lambda model: model(**batch).logits)
    assert_close(ours, theirs)
    assert spy.calls[-1]["mask"].shape == (2, 1, 13, 13)
    assert spy.calls[-1]["mask"].dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_masks_of_four_axes(dtype, rng):
    """They are the caller's, and pass through transformers untouched."""
    kept = torch.from_numpy(rng.random((2, 1, 13, 13)) < 0.5) | torch.eye(13, dtype=torch.bool)
    floats = torch.where(kept, 0.0, torch.finfo(torch.float32).min)
    ids = tiny_models.tokens()["input_ids"]
    model = tiny_models.decoder("Llama")
    theirs = model(ids, attention_mask=floats).logits
    model.set_attn_implementation("numattn")
    mask = kept if dtype == torch.bool else floats
    assert_close(model(ids, attention_mask=mask).logits, theirs)


# ---- a structured mask is a mask -----------------------------------------------------------------


def structured(padding="left"):
    mask = tiny_models.tokens(padding)["attention_mask"].bool()
    made = _transformers_masks.make_mask(2, 13, 13, attention_mask=mask)
    dense = masking_utils.eager_mask(2, 13, 13, attention_mask=mask)
    assert isinstance(made, StructuredMask)
    return made, dense


OPERATIONS = {
    "slice": lambda mask: mask[:, :, :, :13],
    "part": lambda mask: mask[:, :, 3:, 2:7],
    "copy": lambda mask: mask.clone(),
    "double": lambda mask: mask.double(),
    "bool": lambda mask: mask.to(torch.bool),
    "add": lambda mask: torch.ones(2, 4, 13, 13) + mask,
    "compare": lambda mask: mask == 0,
    "where": lambda mask: torch.where(mask < 0, 1.0, 0.0),
    "cat": lambda mask: torch.cat([mask, mask], dim=-1),
    "expand": lambda mask: mask.expand(2, 4, 13, 13),
    "pad": lambda mask: torch.nn.functional.pad(mask, (0, 2)),
    "stack": lambda mask: torch.stack([mask, -mask]),
    "any": lambda mask: (mask < 0).any(dim=-1),
    "list": lambda mask: torch.tensor(mask.tolist()),
    "numpy": lambda mask: torch.from_numpy(mask.numpy().copy()),
    "array": lambda mask: torch.from_numpy(np.asarray(mask).copy()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_see_the_elements(name):
    mask, dense = structured()
    found = OPERATIONS[name](mask)
    assert type(found) is torch.Tensor
    assert torch.equal(found, OPERATIONS[name](dense))


@pytest.mark.parametrize("name", ["copy", "double", "add", "where", "cat", "any", "pickle"])
def test_who_only_reads_a_mask_leaves_its_structure(name):
    mask, _ = structured()
    OPERATIONS[name](mask)
    assert mask.structure() is not None


def test_a_mask_looks_like_the_dense_one():
    mask, dense = structured()
    assert (mask.shape, mask.dtype, mask.device) == (dense.shape, dense.dtype, dense.device)
    assert mask.ndim == 4
    assert "-3.4028e+38" in repr(mask)


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.fill_(0),
        lambda mask: mask[:, :, 2].neg_(),
        lambda mask: mask.__setitem__((0, 0, 5, 0), 0),
        lambda mask: torch.add(mask, torch.tensor(1.0), out=mask),
        lambda mask: mask.numpy().fill(0),
    ],
)
def test_who_writes_to_a_mask_is_heard(write, rng):
    mask, dense = structured()
    write(mask)
    write(dense)
    assert mask.structure() is None
    assert torch.equal(mask.dense(), dense)
    q = torch.from_numpy(rng.standard_normal((2, 4, 13, 8), dtype=np.float32))
    ours, theirs = (
        numattn.transformers.attention_forward(torch.nn.Identity(), q, q, q, x)[0]
        for x in (mask, dense)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", ["slice", "copy"])
@torch.no_grad()
def test_models_that_change_their_masks(change, monkeypatch):
    """A structure that is lost on the way is a dense mask."""
    forward = numattn.transformers.attention_forward
    seen = []

    def changed(module, query, key, value, mask, **options):
        mask = OPERATIONS[change](mask)
        seen.append(type(mask))
        return forward(module, query, key, value, mask, **options)

    batch = tiny_models.tokens("left")
    model = tiny_models.decoder("Mistral")
    theirs = WAYS["forward"](model, batch)
    numattn.transformers.AttentionInterface.register("changed", changed)
    numattn.transformers.AttentionMaskInterface.register("changed", _transformers_masks.make_mask)
    model.set_attn_implementation("changed")
    assert_close(WAYS["forward"](model, batch), theirs)
    assert set(seen) == {torch.Tensor}


@torch.no_grad()
def test_masks_are_of_the_time_when_they_are_made():
    """A static cache moves its offset on before attention, and padding is the caller's."""
    offset, padding = torch.tensor(4), torch.ones(1, 10, dtype=torch.bool)
    mask = _transformers_masks.make_mask(1, 3, 10, q_offset=offset, attention_mask=padding)
    offset.add_(3)
    padding.zero_()
    assert (mask.dense() == 0).sum(dim=-1).tolist() == [[[5, 6, 7]]]


@torch.no_grad()
def test_masks_made_dense_in_a_later_turn_of_a_static_cache():
    forward = numattn.transformers.attention_forward

    def cloning(module, query, key, value, mask, **options):
        return forward(module, query, key, value, mask.clone(), **options)

    numattn.transformers.AttentionInterface.register("cloning", cloning)
    numattn.transformers.AttentionMaskInterface.register("cloning", _transformers_masks.make_mask)
    ids = tiny_models.tokens()["input_ids"]
    model = tiny_models.decoder("Llama")
    results = []
    for name in ("eager", "numattn", "cloning"):
        model.set_attn_implementation(name)
        cache = transformers.StaticCache(model.config, max_cache_len=40)
        model(ids[:, :6], cache=cache)
        results.append(model(ids[:, 6:], cache=cache).logits)
    for found in results[1:]:
        assert_close(found, results[0])


@torch.no_grad()
def test_models_that_add_masks_by_themselves_beside_the_interface(spy):
    """GIT asks transformers for the attention of its pictures alone."""
    model = tiny_models.decoder("Git")
    batch = tiny_models.tokens("left")
    ours, theirs = with_both(model, lambda model: WAYS["forward"](model, batch))
    assert_close(ours, theirs)


# ---- errors --------------------------------------------------------------------------------------


def test_a_mask_of_other_lengths_is_refused():
    mask, _ = structured()
    q, k = torch.zeros(2, 4, 13, 8), torch.zeros(2, 4, 20, 8)
    with pytest.raises(ValueError, match=r"bias: .*13.*20"):
        numattn.transformers.attention_forward(torch.nn.Identity(), q, k, k, mask)


def test_other_devices_are_refused():
    q, meta = torch.zeros(2, 4, 13, 8), torch.zeros(2, 4, 13, 8, device="meta")
    with pytest.raises(ValueError, match="key: got a tensor on meta, expected one on the CPU"):
        numattn.transformers.attention_forward(torch.nn.Identity(), q, meta, q, None)


# What models give to their attention function, and numattn reads or may ignore.
KNOWN = {
    "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "softcap",
    "s_aux", "position_bias", "output_attentions",
    "sliding_window",  # is in the mask
    "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "deterministic",  # of other kernels
}  # fmt: skip


def test_all_arguments_of_all_models_are_known():
    """A release may bring others, which may say who attends to whom."""
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attention_interface":
                found |= {keyword.arg for keyword in node.keywords} - {None}
    assert len(found) > 10
    assert found <= KNOWN | set(numattn.transformers.NOT_COMPUTED)


@torch.no_grad()
@pytest.mark.parametrize("name", numattn.transformers.NOT_COMPUTED)
def test_what_is_not_computed_is_refused(name):
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=f"{name}: got .*use attn_implementation='eager'"):
        numattn.transformers.attention_forward(
            torch.nn.Identity(), q, q, q, None, **{name: torch.zeros(1)}
        )


@torch.no_grad()
def test_sparse_attention_is_refused():
    model = tiny_models.decoder("DeepseekV32")
    model.set_attn_implementation("numattn")
    with pytest.raises(NotImplementedError, match="indices"):
        model(**tiny_models.tokens())


def test_names_of_transformers_are_refused():
    for name in ("sdpa", "eager", "flex_attention"):
        with pytest.raises(
            ValueError, match=f"name: got '{name}', which transformers already uses"
        ):
            numattn.transformers.register(name)


def test_other_transformers_are_refused(monkeypatch):
    def other(batch_size, cache_position, kv_length):
        raise AssertionError

    monkeypatch.setattr(numattn.transformers, "sdpa_mask", other)
    with pytest.raises(ImportError, match=r"transformers .* expected 5\.24"):
        numattn.transformers.register()


@torch.no_grad()
def test_another_name():
    numattn.transformers.register("other")
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_models.decoder("Llama").config, attn_implementation="other"
    )
    assert model.config._attn_implementation == "other"
    assert model(**tiny_models.tokens("left")).logits.isfinite().all()


# ---- the example ---------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parent.parent / "examples" / "transformers_generate.py"


def run_example(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--new-tokens", "4", *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return capsys.readouterr().out


def test_example(monkeypatch, capsys):
    printed = run_example(monkeypatch, capsys, "--length", "20")
    for family in ("Llama", "Gemma 2", "gpt-oss"):
        assert re.search(rf"^{family}.*: 20 tokens read, 4 written$", printed, re.MULTILINE)
    assert printed.count("the same tokens: True") == 3
    assert re.search(r"^  sdpa .* (tokens/s|too fast to tell)$", printed, re.MULTILINE)


def test_example_with_the_files_of_a_model(monkeypatch, capsys, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"word{i}": i for i in range(99)}
    model = tokenizers.models.WordLevel({**words, "unknown": 99}, unk_token="unknown")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="unknown", pad_token="word0"
    )
    fast.save_pretrained(tmp_path)
    tiny_models.decoder("Llama").save_pretrained(tmp_path)
    printed = run_example(
        monkeypatch, capsys, "--model", str(tmp_path), "--prompt", "word5 word7 word9"
    )
    assert "3 tokens read, 4 written" in printed
    assert "the same tokens: True" in printed
    assert "word5 word7 word9 word" in printed

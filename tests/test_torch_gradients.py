"""Promise: `numattn.torch` has the gradients of PyTorch's function, and of numattn's options."""

import numattn as na
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `torch`: torch and ml_dtypes")
pytest.importorskip("ml_dtypes", reason="needs the extra `torch`: torch and ml_dtypes")
from numattn import _torch_passes  # noqa: E402
from numattn.torch import attention, scaled_dot_product_attention  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_calls import array, assert_close, math_attention, tensors  # noqa: E402

torch.manual_seed(0)  # of masks and the like below
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FLOAT64 = {"dtype": torch.float64}

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": torch.rand(5, 9) < 0.6},
    "float mask": {"attn_mask": torch.randn(5, 9)},
    "mask of no key": {"attn_mask": torch.zeros(5, 9, dtype=torch.bool)},
}
NUMATTN_OPTIONS = {
    "causal": {"is_causal": True},
    "window and softcap": {"window": (3, 1), "softcap": 2.5},
    "masks": {"mask": torch.rand(2, 1, 5, 9) < 0.8, "tail_mask": torch.rand(5, 4) < 0.6},
    "slopes": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
    "lengths": {"kv_lengths": torch.tensor([9, 4]), "q_lengths": [5, 2], "is_causal": True},
    "positions": {"is_causal": True, "q_offset": torch.tensor([3, 1])},
    "dropout": {"dropout": 0.4, "rng": 2**64 - 3},
}


def leaves(*given):
    return [x.detach().clone().requires_grad_() for x in given]


def gradients(function, *given, weight=None):
    """Return the gradients of a scalar that all elements of the result are part of."""
    inputs = leaves(*given)
    out = function(*inputs)
    weight = torch.ones_like(out) if weight is None else weight.to(out.dtype)
    return torch.autograd.grad(out, inputs, weight)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_as_by_the_formula(name, torch_dtype):
    q, k, v = tensors(2, 4, 5, 16, lk=9, dtype=torch_dtype)
    weight = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    options = OPTIONS[name]
    ours = gradients(
        lambda *x: scaled_dot_product_attention(*x, **options, strict=True), q, k, v, weight=weight
    )
    exact = [x.double() for x in (q, k, v)]
    formula = gradients(lambda *x: math_attention(*x, **options), *exact, weight=weight)
    for x, wanted, given in zip(ours, formula, (q, k, v), strict=True):
        assert x.dtype == torch_dtype
        assert x.shape == given.shape
        assert_close(x, wanted, torch_dtype)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 33), (17, 5), (31, 64), (65, 63)], ids=str)
def test_of_other_lengths(lengths):
    q, k, v = tensors(1, 2, lengths[0], 8, lk=lengths[1], **FLOAT64)
    ours = gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=True), q, k, v)
    formula = gradients(lambda *x: math_attention(*x, is_causal=True), q, k, v)
    for x, wanted in zip(ours, formula, strict=True):
        assert_close(x, wanted, torch.float64)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (9, 8), (9, 6)),
        ((4, 5, 8), (4, 9, 8), (4, 9, 6)),
        ((2, 4, 5, 8), (4, 9, 8), (4, 9, 6)),
        ((2, 4, 5, 8), (1, 1, 9, 8), (2, 4, 9, 6)),
        ((1, 1, 5, 8), (2, 4, 9, 8), (2, 1, 9, 6)),
    ],
    ids=str,
)
def test_of_inputs_that_broadcast(shapes):
    given = [torch.randn(shape, **FLOAT64) for shape in shapes]
    ours = gradients(lambda *x: scaled_dot_product_attention(*x, strict=True), *given)
    for x, wanted in zip(ours, gradients(math_attention, *given), strict=True):
        assert_close(x, wanted, torch.float64)


@pytest.mark.parametrize("is_expanded", [False, True])
def test_of_inputs_of_any_strides(is_expanded):
    q, k, v = tensors(2, 5, 4, 8, **FLOAT64)
    if is_expanded:
        k, v = k[:1], v[:1]

    def call(q, k, v):
        views = (x.expand(2, 5, 4, 8).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*views, strict=True).transpose(1, 2)

    def formula(q, k, v):
        return math_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    weight = torch.randn(2, 5, 4, 8, **FLOAT64)
    ours = gradients(call, q, k, v, weight=weight)
    for x, wanted in zip(ours, gradients(formula, q, k, v, weight=weight), strict=True):
        assert_close(x, wanted, torch.float64)


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("name", NUMATTN_OPTIONS)
def test_of_every_option(name, layout):
    """By differences of the results, lse, the bias and the sinks among the rest."""
    options = {**NUMATTN_OPTIONS[name], "layout": layout, "return_lse": True}
    q, k, v = tensors(2, 4, 5, 3, lk=9, kv_heads=2, **FLOAT64)
    if layout == "blhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call(q, k, v, bias, sinks):
        out, lse = attention(q, k, v, bias=bias, sinks=sinks, **options)
        return out, lse.nan_to_num(neginf=0)  # of rows that are not valid

    others = (torch.randn(4, 1, 9, **FLOAT64)[None], torch.randn(4, **FLOAT64))
    assert torch.autograd.gradcheck(call, leaves(q, k, v, *others))


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_of_one_input_alone(name):
    q, k, v = tensors(2, 4, 5, 8, lk=9)
    inputs = {"q": q, "k": k, "v": v, "bias": torch.randn(5, 9), "sinks": torch.randn(4)}
    every = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    attention(**every).sum().backward()
    inputs[name].requires_grad_()
    attention(**inputs).sum().backward()
    assert torch.equal(inputs[name].grad, every[name].grad)
    assert [n for n, x in inputs.items() if x.grad is not None] == [name]


def test_of_a_mask_of_pytorch_s_function():
    q, k, v = tensors(2, 4, 5, 8, lk=9, **FLOAT64)
    mask = torch.randn(4, 1, 9, **FLOAT64)
    ours = gradients(lambda m: scaled_dot_product_attention(q, k, v, m, strict=True), mask)
    assert_close(ours[0], gradients(lambda m: math_attention(q, k, v, m), mask)[0], torch.float64)


def test_of_a_mask_that_both_dtypes_fit():
    q, k, v = tensors(2, 4, 5, 8, lk=9, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        mask = torch.randn(5, 9).to(dtype).requires_grad_()
        scaled_dot_product_attention(q, k, v, mask, strict=True).sum().backward()
        assert mask.grad.dtype == dtype


@pytest.mark.parametrize(
    ("name", "value"), [("alibi_slopes", torch.ones(4)), ("scale", torch.tensor(0.5))]
)
def test_options_that_have_none_are_refused(name, value):
    q, k, v = tensors(2, 4, 5, 8)
    value = value.requires_grad_()
    with pytest.raises(TypeError, match=rf"{name}: got a tensor that requires.*`{name}.detach"):
        attention(q, k, v, **{name: value})
    with torch.no_grad():
        out = attention(q, k, v, **{name: value})
    assert torch.equal(out, attention(q, k, v, **{name: value.detach()}))


def test_of_lse_alone():
    q, k, v = leaves(*tensors(2, 4, 5, 8, **FLOAT64))
    _, lse = attention(q, k, v, return_lse=True)
    lse.sum().backward()
    assert not v.grad.any()
    (wanted,) = gradients(
        lambda q: (q @ k.detach().mT / 8**0.5).logsumexp(-1), q, weight=torch.ones(2, 4, 5)
    )
    assert_close(q.grad, wanted, torch.float64)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_the_same_bits_as_numattn(torch_dtype):
    q, k, v = tensors(2, 4, 5, 16, lk=9, dtype=torch_dtype)
    weight = torch.randn(2, 4, 5, 16).to(torch_dtype)
    ours = gradients(lambda *x: attention(*x, is_causal=True), q, k, v, weight=weight)
    _, vjp = na.attention_vjp(*map(array, (q, k, v)), is_causal=True)
    for x, wanted in zip(ours, vjp(array(weight))[:3], strict=True):
        np.testing.assert_array_equal(array(x), wanted, strict=True)


def test_on_every_level_and_in_numpy(backend):
    q, k, v = tensors(2, 4, 17, 16)
    ours = gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=True), q, k, v)
    formula = gradients(lambda *x: math_attention(*x, is_causal=True), q, k, v)
    for x, wanted in zip(ours, formula, strict=True):
        assert_close(x, wanted, torch.float32)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_nothing_is_copied(monkeypatch, torch_dtype):
    seen = {}

    def spy(*arrays, **options):
        names = ("dout", "q", "k", "v", "out")
        seen.update(
            {n: x.__array_interface__["data"][0] for n, x in zip(names, arrays, strict=False)}
        )
        seen["bias"] = options["bias"].__array_interface__["data"][0]
        return na.attention_backward(*arrays, **options)

    monkeypatch.setattr(_torch_passes, "attention_backward", spy)
    q, k, v, bias = leaves(*tensors(2, 4, 5, 8, lk=9, dtype=torch_dtype), torch.randn(5, 9))
    out = attention(q, k, v, bias=bias)
    weight = torch.randn(2, 5, 4, 8).to(torch_dtype).transpose(1, 2)
    given = {"dout": weight, "q": q, "k": k, "v": v, "bias": bias}
    if q.element_size() > 2:  # else it is the result in float32
        given["out"] = out
    found = torch.autograd.grad(out, (q, k, v), weight)
    for name, x in given.items():
        assert seen[name] == x.data_ptr(), name
    # What models do next with gradients, back to (B, L, H * D), copies nothing either.
    for x in found:
        assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_in_checkpoints_drops_the_same_weights(use_reentrant):
    q, k, v = tensors(2, 4, 5, 8, **FLOAT64)

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5, strict=True)

    torch.manual_seed(0)
    kept = gradients(call, q, k, v)
    torch.manual_seed(0)
    computed_again = leaves(q, k, v)
    checkpoint(call, *computed_again, use_reentrant=use_reentrant).sum().backward()
    for x, leaf in zip(kept, computed_again, strict=True):
        assert torch.equal(x, leaf.grad)


def test_autocast_gives_gradients_in_the_dtype_of_the_inputs():
    q, k, v = leaves(*tensors(2, 4, 5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q, k, v, strict=True)
    out.float().sum().backward()
    wanted = gradients(scaled_dot_product_attention, q, k, v)
    for x, of_float32 in zip((q, k, v), wanted, strict=True):
        assert x.grad.dtype == torch.float32
        assert_close(x.grad, of_float32, torch.bfloat16)


def test_second_derivatives_are_refused():
    q, k, v = leaves(*tensors(2, 4, 5, 8))
    out = scaled_dot_product_attention(q, k, v)
    (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="got a derivative of gradients, expected first deriv"):
        first.sum().backward()


def test_inputs_that_were_written_to_are_noticed():
    q, k, v = leaves(*tensors(2, 4, 5, 8))
    mask = torch.ones(5, 5, dtype=torch.bool)
    for written in (k, mask):
        out = scaled_dot_product_attention(q, k, v, mask)
        with torch.no_grad():
            written[..., 0] = False
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_no_gradient_is_kept_where_none_is_wanted():
    q, k, v = leaves(*tensors(2, 4, 5, 8, dtype=torch.bfloat16))
    with torch.no_grad():
        assert scaled_dot_product_attention(q, k, v).grad_fn is None
        assert attention(q, k, v).grad_fn is None
    assert scaled_dot_product_attention(q.detach(), k.detach(), v.detach()).grad_fn is None
    assert scaled_dot_product_attention(q, k.detach(), v.detach()).grad_fn is not None
    mask = torch.zeros(5, 5, requires_grad=True)
    assert scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), mask).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_by_blocks(dtype):
    mask = na.BlockMask.window(100, 100, 20, 0) & na.BlockMask.documents([30, 70])
    q, k, v = torch.randn(3, 2, 4, 100, 16, dtype=dtype, requires_grad=True)
    results = []
    for given in (mask, torch.from_numpy(mask.to_dense())):
        out = attention(q, k, v, mask=given)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, mask=mask), results[0][0])
    with pytest.raises(TypeError, match="mask: got a BlockMask in a recorded program"):
        torch.func.vmap(lambda q: attention(q, k[0], v[0], mask=mask))(q)

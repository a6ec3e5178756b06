"""Promise: `numattn.torch` computes on tensors what PyTorch's function means, and `attention`.

Gradients are in `test_torch_gradients.py`, and programs that are recorded or transformed in
`test_torch_programs.py`.
"""

import doctest
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import numattn as na
import numpy as np
import pytest
from numattn import _arguments, _runtime

torch = pytest.importorskip("torch", reason="needs the extra `torch`: torch and ml_dtypes")
pytest.importorskip("ml_dtypes", reason="needs the extra `torch`: torch and ml_dtypes")
import torch.nn.functional as F  # noqa: E402
from numattn.torch import attention, scaled_dot_product_attention, why_not  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right  # noqa: E402
from torch_calls import array, assert_close, math_attention, tensors  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs/torch.rst"
OF_PYTORCH = F.scaled_dot_product_attention
torch.manual_seed(0)  # of masks and the like below
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LENGTHS = [1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65]


@pytest.fixture
def calls(monkeypatch):
    """Record the arguments of the usual calls, and refuse all others."""
    seen = []

    def spy(*arguments):
        seen.append(arguments)
        result = _runtime.native.attention_common(*arguments)
        assert result is not None, "not accepted in C"
        return result

    if _runtime.native is None:
        pytest.skip("usual calls are the compiled kernels'")
    monkeypatch.setattr(_runtime, "attention_common", spy)
    return seen


# ---- PyTorch's function --------------------------------------------------------------------------


def test_all_lengths(dtype):
    like = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    tensor_dtype = like.get(dtype.name) or getattr(torch, dtype.name)
    for i, length in enumerate(LENGTHS):
        q, k, v = tensors(2, 3, length, 16, lk=LENGTHS[-1 - i], dtype=tensor_dtype)
        for is_causal in (False, True):
            out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, strict=True)
            assert_close(out, math_attention(q, k, v, is_causal=is_causal), tensor_dtype)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "scale that is an int": {"scale": 1},
    "negative scale": {"scale": -0.5},
    "bool mask": {"attn_mask": torch.rand(5, 9) < 0.6},
    "mask of heads": {"attn_mask": torch.rand(4, 5, 9) < 0.6},
    "mask of padding": {"attn_mask": (torch.arange(9) < 6).expand(2, 1, 1, 9)},
    "float mask": {"attn_mask": torch.randn(5, 9)},
    "float mask of heads and items": {"attn_mask": torch.randn(2, 4, 5, 9)},
    "-inf": {"attn_mask": torch.where(torch.rand(5, 9) < 0.6, 0.0, -torch.inf)},
    "mask of no key": {"attn_mask": torch.zeros(5, 9, dtype=torch.bool)},
    "float mask of no key": {"attn_mask": torch.full((5, 9), -torch.inf)},
    "mask and causal": {"attn_mask": torch.rand(5, 9) < 0.6, "is_causal": True},
}


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, torch_dtype):
    q, k, v = tensors(2, 4, 5, 16, lk=9, dtype=torch_dtype)
    out = scaled_dot_product_attention(q, k, v, **OPTIONS[name], strict=True)
    assert out.dtype == torch_dtype
    assert_close(out, math_attention(q, k, v, **OPTIONS[name]), torch_dtype)
    # PyTorch's fast function too; the formula above refuses nothing.
    assert_close(out, OF_PYTORCH(q, k, v, **OPTIONS[name]), torch_dtype)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_float_masks_in_both_dtypes(torch_dtype):
    q, k, v = tensors(2, 4, 5, 16, lk=9, dtype=torch_dtype)
    for mask_dtype in (torch.float32, torch_dtype):
        mask = torch.randn(5, 9).to(mask_dtype)
        out = scaled_dot_product_attention(q, k, v, mask, strict=True)
        assert_close(out, math_attention(q, k, v, mask), torch_dtype)


def test_on_every_level_and_in_numpy(backend):
    q, k, v = tensors(2, 4, 33, 16, lk=40)
    for options in ({"is_causal": True}, {"attn_mask": torch.rand(33, 40) < 0.6}):
        out = scaled_dot_product_attention(q, k, v, **options, strict=True)
        assert_close(out, math_attention(q, k, v, **options), torch.float32)
    ours = attention(q, k, v, window=(5, 0), is_causal=True, sinks=torch.zeros(4))
    theirs = na.attention(*map(array, (q, k, v)), window=(5, 0), is_causal=True, sinks=[0.0] * 4)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (9, 8), (9, 6)),
        ((4, 5, 8), (4, 9, 8), (4, 9, 6)),
        ((3, 2, 4, 5, 8), (3, 2, 4, 9, 8), (3, 2, 4, 9, 6)),
        ((2, 4, 5, 8), (4, 9, 8), (4, 9, 6)),
        ((4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 6)),
        ((5, 8), (2, 4, 9, 8), (2, 4, 9, 6)),
        ((2, 4, 5, 8), (9, 8), (9, 6)),
        ((2, 4, 5, 8), (1, 4, 9, 8), (2, 4, 9, 6)),
        ((1, 4, 5, 8), (2, 4, 9, 8), (1, 4, 9, 6)),
        ((2, 4, 5, 8), (2, 1, 9, 8), (2, 1, 9, 6)),
        ((2, 4, 5, 8), (2, 1, 9, 8), (2, 4, 9, 6)),
        ((2, 4, 5, 8), (2, 4, 9, 8), (2, 1, 9, 6)),
        ((2, 1, 5, 8), (2, 4, 9, 8), (2, 4, 9, 6)),
        ((2, 1, 5, 8), (2, 4, 9, 8), (2, 1, 9, 6)),
        ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6)),
        ((2, 4, 0, 8), (2, 4, 9, 8), (2, 4, 9, 6)),
        ((0, 4, 5, 8), (0, 4, 9, 8), (0, 4, 9, 6)),
    ],
    ids=str,
)
def test_shapes_broadcast_as_in_pytorch(shapes):
    q, k, v = (torch.randn(shape) for shape in shapes)
    out = scaled_dot_product_attention(q, k, v, strict=True)
    assert_close(out, OF_PYTORCH(q, k, v), torch.float32)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6)),
        ((2, 4, 5, 8), (2, 1, 9, 8), (2, 1, 9, 6)),
        ((2, 4, 5, 8), (2, 2, 9, 8), (2, 1, 9, 6)),
        ((4, 5, 8), (2, 9, 8), (2, 9, 6)),
        ((2, 4, 5, 8), (1, 2, 9, 8), (1, 2, 9, 6)),
        ((2, 4, 5, 8), (2, 9, 8), (2, 9, 6)),
    ],
    ids=str,
)
def test_grouped_heads(shapes):
    q, k, v = (torch.randn(shape) for shape in shapes)
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True, strict=True)
    assert_close(out, OF_PYTORCH(q, k, v, enable_gqa=True), torch.float32)


def test_a_mask_with_the_batch_s_first_axis_is_read_as_pytorch_reads_it(calls):
    """Without the warning of `numattn.attention`, which asks what is meant, and at no more cost."""
    q, k, v = tensors(4, 4, 5, 8, lk=9)
    mask = torch.rand(4, 5, 9) < 0.6
    expected = OF_PYTORCH(q, k, v, mask)
    assert_close(scaled_dot_product_attention(q, k, v, mask, strict=True), expected, torch.float32)
    assert len(calls) == 1
    out = scaled_dot_product_attention(q.requires_grad_(), k, v, mask, strict=True)
    assert_close(out, expected, torch.float32)


STRIDED = {
    "heads and rows exchanged": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second row": lambda x: torch.cat([x, x], -1).reshape(*x.shape[:2], -1, 8)[:, :, ::2],
    "part of a wider array": lambda x: torch.cat([x, x], -1)[..., 8:],
    "columns apart": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one for all": lambda x: x[:1, :1].expand(x.shape),
    "rows that overlap": lambda x: x.contiguous().as_strided(x.shape, (40, 8, 4, 1)),
    "a sign to be changed": torch._neg_view,
    "a parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STRIDED)
def test_tensors_of_any_strides(name, torch_dtype):
    q, k, v = (STRIDED[name](x) for x in tensors(2, 4, 7, 8, dtype=torch_dtype))
    with torch.no_grad():
        out = scaled_dot_product_attention(q, k, v, is_causal=True, strict=True)
    plain = [x.detach().resolve_neg().contiguous() for x in (q, k, v)]
    assert torch.equal(out, scaled_dot_product_attention(*plain, is_causal=True, strict=True))


# ---- what is left to PyTorch ---------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def left_to_pytorch():
    """Return, by name: arguments, options, and what the reason matches."""
    q, k, v = tensors(2, 4, 5, 8, lk=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, and sparse tensors have states of their own
        nested = torch.nested.nested_tensor([torch.randn(4, 5, 8), torch.randn(4, 3, 8)])
    sub = q.as_subclass(Subclass)
    meta = q.to("meta")
    mask = torch.randn(5, 9)
    plain = "plain tensors on the CPU"
    return {
        "an array": ((q.numpy(), k, v), {}, f"query: got ndarray, numattn takes {plain}"),
        "another device": ((meta,) * 3, {}, f"query: got a tensor on meta, numattn takes {plain}"),
        "nested": ((nested,) * 3, {}, "query: got a nested tensor, "),
        "a subclass": ((sub, sub, sub), {}, "query: got a Subclass, a subclass of Tensor, "),
        "sparse": ((q, k.to_sparse(), v), {}, "key: got a tensor of layout torch.sparse_coo"),
        "ints": ((q.int(), k.int(), v.int()), {}, "query: got dtype torch.int32, .* float16"),
        "8 bits": ([x.to(torch.float8_e4m3fn) for x in (q, k, v)], {}, "torch.float8_e4m3fn"),
        "complex": ([x.cfloat() for x in (q, k, v)], {}, "query: got dtype torch.complex64"),
        "two dtypes": ((q, k.double(), v), {}, "query torch.float32, key torch.float64, value"),
        "one axis": ((q[0, 0, 0],) * 3, {}, r"got shapes \(8,\), .*at least 2 axes"),
        "another dim": ((q, k[..., :4], v), {}, r"\(2, 4, 9, 4\).*\(\.\.\., Lk, D\)"),
        "no elements": ((q[..., :0], k[..., :0], v), {}, "at least one element in the last axis"),
        "no heads": ((q[:, :0], k[:, :0], v[:, :0]), {}, "at least one head"),
        "other heads": ((q, k[:, :2], v[:, :2]), {}, "broadcast .heads too without enable_gqa"),
        "two axes in groups": ((q[0, 0],) * 3, {"enable_gqa": True}, "3 axes with enable_gqa"),
        "3 of 4 heads": ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}, "divide the number of"),
        "4 and 2 heads": ((q, k, v[:, :2]), {"enable_gqa": True}, "the same number of heads"),
        "a mask of one axis": ((q, k, v, mask[0]), {}, r"shapes \(9,\), .*two axes"),
        "a mask too wide": ((q, k, v, torch.randn(3, 2, 4, 5, 9)), {}, "attn_mask, query"),
        "a mask too long": (
            (q, k, v, torch.randn(5, 8)),
            {},
            r"\(5, 8\), \(2, 4, 5, 8\).*to \(\.\.\., Lq, Lk\)",
        ),
        "a mask of ints": ((q, k, v, mask.int()), {}, "attn_mask: got dtype torch.int32, .* bool"),
        "a mask in float64": ((q, k, v, mask.double()), {}, "attn_mask: got dtype torch.float64"),
        "a mask that is an object": (
            (q, k, v, causal_lower_right(5, 9)),
            {},
            "attn_mask: got a CausalBias, a subclass",
        ),
        "a mask elsewhere": ((q, k, v, mask.to("meta")), {}, "attn_mask: got a tensor on meta"),
        "all dropped": ((q, k, v), {"dropout_p": 1.0}, "dropout_p: got 1.0, .*less than 1"),
        "negative share": ((q, k, v), {"dropout_p": -0.5}, "dropout_p: got -0.5"),
        "causal as an int": ((q, k, v), {"is_causal": 1}, "is_causal: got 1, .*True or False"),
        "scale of NaN": ((q, k, v), {"scale": np.nan}, "scale: got nan"),
        "a large scale": ((q, k, v), {"scale": 1e35}, r"scale: got 1e\+35, .*below 1e\+30"),
        "a tensor as scale": ((q, k, v), {"scale": torch.tensor(0.5)}, "scale: got tensor"),
    }


LEFT = left_to_pytorch()


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_pytorch(name):
    arguments, options, reason = LEFT[name]
    text = why_not(*arguments, **options)
    assert text is not None
    with pytest.raises(NotImplementedError, match=reason) as caught:
        scaled_dot_product_attention(*arguments, **options, strict=True)
    assert text in str(caught.value)
    assert "PyTorch's function computes the call" in str(caught.value)
    if name == "a mask elsewhere":  # which PyTorch reads without looking where it is
        return
    torch.manual_seed(0)
    try:
        expected = OF_PYTORCH(*arguments, **options)
    except Exception as error:
        with pytest.raises(type(error)):
            scaled_dot_product_attention(*arguments, **options)
    else:
        torch.manual_seed(0)
        out = scaled_dot_product_attention(*arguments, **options)
        assert type(out) is type(expected)
        if not (out.is_nested or out.is_meta):
            torch.testing.assert_close(out, expected, equal_nan=True)


def test_some_of_these_pytorch_computes():
    """Or the test above would compare errors alone."""
    computed = 0
    for arguments, options, _ in LEFT.values():
        try:
            OF_PYTORCH(*arguments, **options)
        except Exception:
            continue
        computed += 1
    assert computed >= 6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own use
def test_forward_mode_is_left_to_pytorch():
    q, k, v = tensors(2, 4, 5, 8)
    with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        assert "forward-mode derivatives" in why_not(dual, k, v)
        out = scaled_dot_product_attention(dual, k, v)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
        with pytest.raises(TypeError, match="q, k, v, bias, sinks: got forward-mode derivatives"):
            attention(dual, k, v)
        bias = torch.autograd.forward_ad.make_dual(torch.ones(5, 5), torch.ones(5, 5))
        with pytest.raises(TypeError, match="got forward-mode derivatives"):
            attention(q, k, v, bias=bias)


def test_in_the_place_of_pytorch_s_function(monkeypatch):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 32)
    expected = layer(x)
    used = []

    def ours(*arguments, **options):
        used.append(why_not(*arguments, **options))
        return scaled_dot_product_attention(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", ours)
    assert_close(layer(x), expected, torch.float32)
    assert used == [None]
    with torch.no_grad():  # where PyTorch's layer has a fast path of its own
        assert_close(layer.eval()(x), expected, torch.float32)
        assert used == [None]
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert_close(layer(x), expected, torch.float32)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert used == [None, None]
    with pytest.raises(RuntimeError, match="at least 2 dimensional"):  # of PyTorch, once
        F.scaled_dot_product_attention(x[0, 0], x[0, 0], x[0, 0])


# ---- numattn's options ---------------------------------------------------------------------------

NUMATTN_OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (3, 1)},
    "causal from the top left": {"is_causal": True, "q_offset": 0},
    "positions": {"is_causal": True, "q_offset": torch.tensor([3, 1])},
    "positions of 32 bits": {"is_causal": True, "q_offset": torch.tensor([3, 1]).int()},
    "positions in a list": {"is_causal": True, "q_offset": [3, 1]},
    "mask": {"mask": torch.rand(2, 1, 5, 9) < 0.6},
    "mask that is an array": {"mask": (torch.rand(2, 1, 5, 9) < 0.6).numpy()},
    "tail mask": {"tail_mask": torch.rand(5, 4) < 0.6},
    "both masks": {"mask": torch.rand(5, 9) < 0.8, "tail_mask": torch.rand(5, 4) < 0.6},
    "bias": {"bias": torch.randn(4, 5, 9)[None]},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.5},
    "slopes": {"alibi_slopes": torch.rand(4)},
    "slopes in a list": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
    "slopes of 16 bits": {"alibi_slopes": torch.rand(4).bfloat16()},
    "sinks": {"sinks": torch.randn(4)},
    "sinks of 16 bits": {"sinks": torch.randn(4).bfloat16()},
    "sinks in an array": {"sinks": np.arange(4.0)},
    "lengths": {"kv_lengths": torch.tensor([9, 4])},
    "length": {"kv_lengths": 6},
    "both lengths": {"kv_lengths": [9, 4], "q_lengths": [5, 2], "is_causal": True},
    "dropout": {"dropout": 0.4, "rng": 2**64 - 3},
    "threads": {"num_threads": 2},
}


def as_arrays(options):
    return {n: array(x) if isinstance(x, torch.Tensor) else x for n, x in options.items()}


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NUMATTN_OPTIONS)
def test_the_same_bits_as_numattn(name, torch_dtype):
    options = NUMATTN_OPTIONS[name]
    q, k, v = tensors(2, 4, 5, 16, lk=9, kv_heads=2, dtype=torch_dtype)
    for layout in ("bhld", "blhd"):
        given = [x.transpose(1, 2) if layout == "blhd" else x for x in (q, k, v)]
        arrays = [array(x) for x in given]
        wanted, wanted_lse = na.attention(
            *arrays, **as_arrays(options), layout=layout, return_lse=True
        )
        out, lse = attention(*given, **options, layout=layout, return_lse=True)
        assert out.dtype == torch_dtype
        assert_same_bits(out, wanted)
        assert_same_bits(lse, wanted_lse)
        assert_same_bits(attention(*given, **options, layout=layout), wanted)
        # With gradients all that differs by head or item becomes a tensor, and what is of 16 bits
        # is computed as for a result of float32.
        if q.element_size() == 2:
            of_float32 = np.empty(wanted.shape, np.float32)
            _, wanted_lse = na.attention(
                *arrays, **as_arrays(options), layout=layout, return_lse=True, out=of_float32
            )
            wanted = of_float32.astype(wanted.dtype)
        out, lse = attention(
            given[0].clone().requires_grad_(), *given[1:], **options, layout=layout, return_lse=True
        )
        assert out.requires_grad
        assert lse.requires_grad
        assert_same_bits(out.detach(), wanted)
        assert_same_bits(lse.detach(), wanted_lse)


def assert_same_bits(tensor, wanted):
    np.testing.assert_array_equal(array(tensor), wanted, strict=True)


def test_has_every_option_of_numattn():
    def options(function):
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    of_arrays_alone = {"out", "k_scale", "v_scale"}
    wanted = {n: x for n, x in options(na.attention).items() if n not in of_arrays_alone}
    assert options(attention) == wanted


def test_signature_is_pytorch_s():
    ours = inspect.signature(scaled_dot_product_attention).parameters
    assert ", ".join(ours) == (
        "query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, strict"
    )
    documented = F.scaled_dot_product_attention.__doc__
    for name in list(ours)[:-1]:
        assert name in documented, name
    assert list(inspect.signature(why_not).parameters) == list(ours)[:-1]


ELSEWHERE = torch.ones(5, 9, device="meta")
BAD = [
    ({"k": np.ones((2, 4, 9, 8))}, TypeError, "k: got ndarray, expected a plain torch.Tensor"),
    ({"q": torch.ones(2, 4, 5, 8).to("meta")}, TypeError, "q: got a tensor on meta, expected"),
    ({"v": torch.ones(2, 4, 9, 8).as_subclass(Subclass)}, TypeError, "v: got a Subclass, a sub"),
    ({"q": torch.ones(2, 4, 5, 8).long()}, TypeError, "q: got dtype torch.int64, .* float16"),
    ({"k": torch.ones(2, 4, 9, 8).double()}, TypeError, "q float32, k float64, v float32"),
    ({"k": torch.ones(2, 4, 9, 4)}, ValueError, r"head_dim 4, expected 8 .*k \(2, 4, 9, 4\)"),
    ({"mask": torch.ones(5, 9)}, TypeError, "mask: got dtype float32, expected bool"),
    ({"mask": ELSEWHERE}, TypeError, "mask: got a tensor on meta, expected a plain torch.Tensor"),
    ({"bias": torch.ones(5, 8)}, ValueError, r"bias: got shape \(5, 8\)"),
    ({"bias": torch.ones(5, 9).double()}, TypeError, "bias: got dtype float64"),
    ({"window": (1, 2, 3)}, ValueError, "window: got "),
    ({"window": 3}, TypeError, "window: got 3"),
    ({"layout": "lbhd"}, ValueError, "layout: got 'lbhd'"),
    ({"kv_lengths": torch.tensor([10, 1])}, ValueError, r"kv_lengths: got 10 at index 0"),
    ({"dropout": 1.5}, ValueError, "dropout: got 1.5"),
    ({"dropout": "a"}, TypeError, "dropout: got 'a'"),
    ({"dropout": 0.5, "rng": -1}, ValueError, "rng: got -1"),
    ({"is_causal": 1}, TypeError, "is_causal: got 1"),
    ({"scale": "a"}, TypeError, "scale: got 'a'"),
    ({"num_threads": 0}, ValueError, "num_threads: got 0"),
    ({"return_lse": 1}, TypeError, "return_lse: got 1"),
    ({"attn_mask": None}, TypeError, r"attention\(\) got .*'attn_mask'; .*`mask=`"),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[str([*b[0]]) for b in BAD])
def test_errors_say_what_came_and_what_to_pass(changed, error, message, requires_grad):
    q, k, v = (x.requires_grad_(requires_grad) for x in tensors(2, 4, 5, 8, lk=9))
    with pytest.raises(error, match=message):
        attention(**{"q": q, "k": k, "v": v, **changed})


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in STRIDED if n not in ("a sign to be changed",)])
def test_inputs_are_read_where_they_are(calls, name, torch_dtype):
    q, k, v = (STRIDED[name](x).detach() for x in tensors(2, 4, 7, 8, dtype=torch_dtype))
    mask = torch.randn(7, 7).to(torch_dtype)
    scaled_dot_product_attention(q, k, v, mask, strict=True)
    attention(q, k, v, bias=mask)
    assert len(calls) == 2
    for call in calls:
        for seen, given in zip((*call[:3], call[5]), (q, k, v, mask), strict=True):
            assert seen.__array_interface__["data"][0] == given.data_ptr()


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_the_result_is_what_the_kernels_wrote(monkeypatch, torch_dtype):
    written = []

    def spy(*arguments):
        written.append(_runtime.native.attention_common(*arguments))
        return written[-1]

    if _runtime.native is None:
        pytest.skip("usual calls are the compiled kernels'")
    monkeypatch.setattr(_runtime, "attention_common", spy)
    out = scaled_dot_product_attention(*tensors(2, 4, 7, 8, dtype=torch_dtype))
    assert out.data_ptr() == written[0].__array_interface__["data"][0]


def test_usual_calls_are_accepted_in_c(calls, monkeypatch):
    monkeypatch.setattr(_arguments, "check", None)
    for torch_dtype in DTYPES:
        for length in (1, 5):
            q, k, v = tensors(2, 4, length, 16, lk=9, dtype=torch_dtype)
            few = k[:, :2]
            for options in OPTIONS.values():
                if options.get("scale") != 1 and not (length == 1 and "attn_mask" in options):
                    scaled_dot_product_attention(q, k, v, **options, strict=True)
            scaled_dot_product_attention(q, few, few, enable_gqa=True, strict=True)
            for name, options in NUMATTN_OPTIONS.items():
                if name in ("dropout", "both masks"):  # which C does not take
                    continue
                if length == 5 or not {"mask", "tail_mask", "bias", "q_lengths"} & {*options}:
                    attention(q, few, few, **options)
    assert len(calls) > 200


def test_parameters_and_inference_mode(calls):
    q, k, v = map(torch.nn.Parameter, tensors(2, 4, 5, 8))
    expected = attention(q.data, k.data, v.data)
    with torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(q, k, v), expected)
        assert torch.equal(attention(q, k, v), expected)
    sinks = torch.nn.Parameter(torch.randn(4).bfloat16())
    bias = torch.nn.Parameter(torch.randn(5, 5))
    before = len(calls)
    with torch.no_grad():  # as models have them
        attention(q.data, k.data, v.data, bias=bias, sinks=sinks)
    assert len(calls) == before + 1
    with torch.inference_mode():
        assert torch.equal(scaled_dot_product_attention(q.data, k.data, v.data), expected)
        assert torch.equal(scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (2, 4, 1, 8), (2, 1, 5, 8), (4, 5, 8), (5, 8)])
def test_merging_heads_copies_nothing(shape, requires_grad, torch_dtype):
    q = torch.randn(shape).to(torch_dtype).requires_grad_(requires_grad)
    for out in (scaled_dot_product_attention(q, q, q), attention(q, q, q, window=(2, 2))):
        assert out.shape == q.shape
        if q.ndim > 2:
            rows_first = out.transpose(-2, -3)
            merged = rows_first.reshape(*rows_first.shape[:-2], -1)
            assert merged.data_ptr() == out.data_ptr()
            assert merged.is_contiguous()


def test_the_default_device_changes_nothing():
    q, k, v = tensors(2, 4, 5, 8)
    options = {"is_causal": True, "dropout": 0.5, "rng": 7, "kv_lengths": [5, 3], "q_offset": 0}
    expected = attention(q, k, v, **options)
    with torch.device("meta"):
        out = attention(q.requires_grad_(), k, v, **options)
        scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5).sum().backward()
    assert torch.equal(out, expected)


def test_results_may_be_written_to_and_outlive_their_inputs():
    out = scaled_dot_product_attention(*tensors(2, 4, 5, 8))
    before = out.clone()
    out += 1
    assert torch.equal(out, before + 1)


# ---- dropout, threads, autocast ------------------------------------------------------------------


def test_dropout_follows_pytorch_s_generator():
    q, k, v = tensors(2, 4, 5, 8, lk=9)

    def seeded(seed, **options):
        torch.manual_seed(seed)
        return scaled_dot_product_attention(q, k, v, **options, strict=True)

    first = seeded(0, dropout_p=0.5)
    assert torch.equal(first, seeded(0, dropout_p=0.5))
    assert not torch.equal(first, seeded(1, dropout_p=0.5))
    assert not torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(seeded(0), scaled_dot_product_attention(q, k, v))
    torch.manual_seed(0)
    assert torch.equal(first, attention(q, k, v, dropout=0.5))
    before = torch.get_rng_state()
    scaled_dot_product_attention(q, k, v)
    attention(q, k, v, dropout=0.5, rng=3)
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_drops_its_share():
    q, k = torch.zeros(2, 1, 1, 200, 8)
    v = torch.eye(200)[None, None]  # the result is the weights
    dropped = scaled_dot_product_attention(q, k, v, dropout_p=0.3, strict=True)
    share = (dropped == 0).double().mean().item()
    assert abs(share - 0.3) < 0.02
    kept = dropped[dropped != 0]
    assert_close(kept, torch.full_like(kept, 1 / 200 / 0.7), torch.float32)


def test_threads(calls):
    q, k, v = tensors(1, 2, 5, 8)
    attention(q, k, v, num_threads=3)
    attention(q, k, v)
    scaled_dot_product_attention(q, k, v)
    assert [call[18] for call in calls] == [3, None, None]  # None: `get_num_threads`
    before = na.get_num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    assert na.get_num_threads() == before[0]
    torch.set_num_threads(before[1])


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(given, wanted):
    q, k, v = tensors(2, 4, 5, 8, lk=9, dtype=given)
    mask = torch.randn(5, 9).to(given)
    with torch.autocast("cpu", wanted):
        out = scaled_dot_product_attention(q, k, v, mask, strict=True)
        expected = OF_PYTORCH(q, k, v, mask)
        ours = attention(q, k, v, bias=mask)
    assert out.dtype == expected.dtype == ours.dtype
    assert out.dtype == (torch.float64 if given == torch.float64 else wanted)
    assert_close(out, expected, out.dtype)
    assert torch.equal(out, ours)


def test_autocast_makes_one_dtype_of_several():
    q, k, v = tensors(2, 4, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q.half(), k, v.bfloat16(), strict=True)
        assert_close(out, OF_PYTORCH(q.half(), k, v.bfloat16()), torch.bfloat16)
        assert "torch.float64, key torch.bfloat16" in why_not(q.double(), k, v)
    with torch.autocast("cpu", enabled=False):
        assert scaled_dot_product_attention(q, k, v, strict=True).dtype == torch.float32


# ---- the module ----------------------------------------------------------------------------------


def in_python(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_numattn_alone_does_not_import_torch():
    done = in_python("import sys, numattn; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["torch", "ml_dtypes"])
def test_without_a_package_the_error_says_what_to_install(package):
    done = in_python(f"import sys; sys.modules[{package!r}] = None; import numattn.torch")
    assert "pip install 'numattn[torch]'" in done.stderr
    assert package in done.stderr


def test_page():
    assert doctest.testfile(str(PAGE), module_relative=False).failed == 0

"""Promise: programs with `numattn.torch` in them are compiled, exported and transformed."""

import shutil

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `torch`: torch and ml_dtypes")
pytest.importorskip("ml_dtypes", reason="needs the extra `torch`: torch and ml_dtypes")
import numattn.torch  # noqa: E402, F401
from numattn.torch import attention, scaled_dot_product_attention, why_not  # noqa: E402
from torch.func import grad, jvp, vmap  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch_calls import assert_close, tensors  # noqa: E402

# PyTorch uses what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORWARD = torch.ops.numattn.attention.default
BACKWARD = torch.ops.numattn.attention_backward.default
FLOAT64 = {"dtype": torch.float64}


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def leaves(*given):
    return [x.detach().clone().requires_grad_() for x in given]


def causal(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, strict=True)


def with_options(q, k, v, bias, sinks, lengths):
    return attention(
        q, k, v, bias=bias, sinks=sinks, kv_lengths=lengths, q_lengths=lengths, is_causal=True,
        window=(3, 0), softcap=5.0, scale=0.3, alibi_slopes=[0.1, 0.2, 0.3, 0.4], return_lse=True,
    )  # fmt: skip


def with_options_given(dtype):
    q, k, v = tensors(2, 4, 6, 8, kv_heads=2, dtype=dtype)
    return q, k, v, torch.randn(4, 6, 6)[None], torch.randn(4), torch.tensor([3, 6])


# ---- the operators -------------------------------------------------------------------------------


def operands(q, k, v, *, bias=None, sinks=None, layout="bhld", keeps=True, seed=None):
    dropout = 0.0 if seed is None else 0.5
    return (
        q, k, v, None, None, bias, sinks, None, None, None, None, seed, True, 3, None, None, None,
        dropout, layout, None, keeps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("torch_dtype", "length", "layout"),
    [
        (torch.float32, 6, "bhld"),
        (torch.float64, 6, "blhd"),
        (torch.float16, 1, "blhd"),
        (torch.bfloat16, 6, "blhd"),
        (torch.bfloat16, 1, "bhld"),
    ],
    ids=str,
)
def test_operators_keep_pytorch_s_rules(torch_dtype, length, layout):
    q, k, v = tensors(2, 4, length, 8, lk=7, kv_heads=2, dtype=torch_dtype)
    if layout == "blhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias, sinks = torch.randn(4, length, 7)[None], torch.randn(4)
    given = leaves(q, k, v, bias, sinks)
    arguments = operands(*given[:3], bias=given[3], sinks=given[4], layout=layout)
    torch.library.opcheck(FORWARD, arguments)
    torch.library.opcheck(FORWARD, operands(q, k, v, seed=torch.tensor(-3), layout=layout))
    out, kept, lse = FORWARD(*operands(q, k, v, bias=bias, sinks=sinks, layout=layout))
    kept = out if q.element_size() > 2 else kept
    others = operands(q, k, v, bias=bias, sinks=sinks, layout=layout)[3:-1]
    for bias_gradient in (False, True):
        given = (torch.ones_like(out), None, q, k, v, kept, lse, *others, bias_gradient)
        torch.library.opcheck(BACKWARD, given)


@pytest.mark.parametrize("shapes", [((5, 8),) * 3, ((1, 4, 5, 8), (2, 1, 9, 8), (2, 1, 9, 6))])
def test_operators_keep_the_rules_with_other_shapes(shapes):
    torch.library.opcheck(FORWARD, operands(*leaves(*(torch.randn(shape) for shape in shapes))))


def test_an_operator_recorded_without_gradients_says_so():
    q, k, v = leaves(*tensors(2, 4, 5, 8))
    out = FORWARD(*operands(q, k, v, keeps=False))[0]
    with pytest.raises(RuntimeError, match=r"keeps=False.*expected keeps=True"):
        out.sum().backward()


def test_second_derivatives_of_the_operator_are_refused():
    q, k, v = leaves(*tensors(2, 4, 5, 8))
    out = FORWARD(*operands(q, k, v))[0]
    (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="got a derivative of gradients, expected first deriv"):
        first.sum().backward()


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_compiled(torch_dtype):
    given = tensors(2, 4, 6, 8, lk=7, kv_heads=2, dtype=torch_dtype)
    function = compiled(causal)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            out = function(*given)
            assert_close(out, causal(*given), torch_dtype)
            assert out.transpose(1, 2).is_contiguous()
    ours, eager = leaves(*given), leaves(*given)
    function(*ours).sin().sum().backward()
    causal(*eager).sin().sum().backward()
    for x, wanted in zip(ours, eager, strict=True):
        assert torch.equal(x.grad, wanted.grad)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_compiled_with_options(torch_dtype):
    given = with_options_given(torch_dtype)
    function = compiled(with_options)
    for x, wanted in zip(function(*given), with_options(*given), strict=True):
        assert_close(x, wanted, torch_dtype)
    ours, eager = leaves(*given[:-1]), leaves(*given[:-1])
    for call, inputs in ((function, ours), (with_options, eager)):
        out, lse = call(*inputs, given[-1])
        (out.sum() + lse[:, :, :3].sum()).backward()
    for x, wanted in zip(ours, eager, strict=True):
        torch.testing.assert_close(x.grad, wanted.grad)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.rand(2, 1, 6, 7) < 0.6},
        {"attn_mask": torch.randn(6, 7)},
        {"scale": 0.5},
        {"is_causal": True},
    ],
    ids=str,
)
def test_compiled_with_options_of_pytorch(options):
    q, k, v = tensors(2, 4, 6, 8, lk=7)

    def call(q, k, v, **options):
        return scaled_dot_product_attention(q, k, v, **options, strict=True)

    assert torch.equal(compiled(call)(q, k, v, **options), call(q, k, v, **options))


def test_compiled_with_lengths_that_change():
    function = compiled(lambda q, k, v: causal(q, k, v) + 1, dynamic=True)
    for length in (2, 5, 9):
        given = tensors(2, 4, length, 8, lk=length + 3)
        assert torch.equal(function(*given), causal(*given) + 1)


def test_compiled_with_positions_that_change():
    """As a model with a cache calls it."""

    def call(q, k, v, step):
        return attention(q, k, v, is_causal=True, q_offset=step, window=(step, None))

    q, k, v = tensors(2, 4, 2, 8, lk=12)
    function = compiled(call, dynamic=True)
    for step in (2, 3, 7):
        assert torch.equal(function(q, k, v, step), call(q, k, v, step))


def test_compiled_dropout_follows_pytorch_s_generator():
    q, k, v = tensors(2, 4, 6, 8)
    function = compiled(lambda: scaled_dot_product_attention(q, k, v, dropout_p=0.5, strict=True))

    def seeded(seed):
        torch.manual_seed(seed)
        return function()

    assert torch.equal(seeded(0), seeded(0))
    assert not torch.equal(seeded(0), function())
    fixed = compiled(lambda: attention(q, k, v, dropout=0.5, rng=2**64 - 3))
    assert torch.equal(fixed(), attention(q, k, v, dropout=0.5, rng=2**64 - 3))


def test_compiled_autocast():
    q, k, v = tensors(2, 4, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(causal)(q, k, v)
        assert out.dtype == torch.bfloat16
        assert_close(out, causal(q, k, v), torch.bfloat16)


def test_compiled_calls_that_are_left_to_pytorch():
    q, k, v = tensors(2, 4, 6, 8)

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=1.0)

    assert not compiled(call, dynamic=True)(q, k, v).any()
    other_heads = compiled(
        lambda q, k: scaled_dot_product_attention(q, k, k[:, :2], enable_gqa=True), dynamic=True
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, k[:, :2], enable_gqa=True)
    assert_close(other_heads(q, k), wanted, torch.float32)
    strict = compiled(lambda q: scaled_dot_product_attention(q, q, q, dropout_p=1.0, strict=True))
    with pytest.raises(Exception, match=r"dropout_p: got 1\.0"):
        strict(q)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, by which PyTorch compiles")
def test_compiled_by_the_usual_backend():
    q, k, v = tensors(2, 4, 6, 8)
    torch.compiler.reset()

    def call(q, k, v):
        out = causal(q * 2, k, v)
        return out.transpose(1, 2).reshape(2, 6, 32) + 1

    with torch._inductor.config.patch(compile_threads=1):
        ours, eager = leaves(q, k, v), leaves(q, k, v)
        out = torch.compile(call, fullgraph=True)(*ours)
        torch.testing.assert_close(out, call(*eager))
        out.sum().backward()
        call(*eager).sum().backward()
    for x, wanted in zip(ours, eager, strict=True):
        torch.testing.assert_close(x.grad, wanted.grad)


# ---- torch.export and other records --------------------------------------------------------------


class Causal(torch.nn.Module):
    def forward(self, q, k, v):
        return causal(q, k, v)


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    given = tensors(2, 4, 6, 8, lk=7, kv_heads=2)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        Causal(), tuple(given), dynamic_shapes=({2: length}, None, None), strict=strict
    )
    assert FORWARD in targets(program.graph)
    module = program.module()
    assert torch.equal(module(*given), causal(*given))
    given[0] = given[0][:, :, :3]
    assert torch.equal(module(*given), causal(*given))


def test_recorded_by_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    given = tensors(2, 4, 6, 8)
    module = make_fx(causal)(*given)
    assert FORWARD in targets(module.graph)
    other = [x + 1 for x in given]
    assert torch.equal(module(*other), causal(*other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_recorded_by_jit_trace():
    """A record has the call in it, and not its result."""
    given = tensors(2, 4, 6, 8)
    traced = torch.jit.trace(causal, tuple(given), check_trace=False)
    other = [x + 1 for x in given]
    assert torch.equal(traced(*other), causal(*other))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, 6, 8, dtype=torch.bfloat16) for _ in range(3))
        out = causal(q, k, v)
    for x in (out, causal(q, k, v), attention(q, k, v)):
        assert type(x) is type(q)
        assert x.shape == (2, 4, 6, 8)
        assert x.dtype == torch.bfloat16
        assert x.stride() == (192, 8, 32, 1)


# ---- torch.func ----------------------------------------------------------------------------------


def in_turn(function, axes, *given):
    items = [
        function(
            *(x if axis is None else x.select(axis, i) for x, axis in zip(given, axes, strict=True))
        )
        for i in range(3)
    ]
    return torch.stack(items)


SHAPES = {
    "all": (((3, 2, 4, 5, 8),) * 3, (0, 0, 0)),
    "queries": (((3, 2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)), (0, None, None)),
    "keys and values": (((2, 4, 5, 8), (3, 2, 4, 6, 8), (3, 2, 4, 6, 8)), (None, 0, 0)),
    "other axes": (((2, 3, 4, 5, 8), (2, 4, 6, 3, 8), (2, 4, 6, 8, 3)), (1, 3, 4)),
    "heads": (((3, 4, 5, 8),) * 3, (0, 0, 0)),
    "one head": (((3, 5, 8),) * 3, (0, 0, 0)),
    "one head, other axes": (((5, 3, 8), (6, 8), (6, 8, 3)), (1, None, 2)),
    "fewer axes": (((3, 2, 4, 5, 8), (4, 6, 8), (3, 4, 6, 8)), (0, None, 0)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_vmap(name):
    shapes, axes = SHAPES[name]
    given = [torch.randn(shape) for shape in shapes]

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, strict=True)

    assert_close(vmap(call, axes)(*given), in_turn(call, axes, *given), torch.float32)
    assert_close(compiled(vmap(call, axes))(*given), in_turn(call, axes, *given), torch.float32)


MAPPED = {
    "bias": (torch.randn(3, 5, 6), 0),
    "mask": (torch.rand(4, 3, 5, 6) < 0.6, 1),
    "tail_mask": (torch.rand(3, 5, 2) < 0.6, 0),
    "sinks": (torch.randn(3, 4), 0),
    "alibi_slopes": (torch.rand(4, 3), 1),
    "q_offset": (torch.tensor([0, 1, 2]), 0),
    "kv_lengths": (torch.tensor([[6, 1], [2, 3], [4, 5]]), 0),
}


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_of_options(name, layout):
    q, k, v = tensors(2, 4, 5, 8, lk=6)
    if layout == "blhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    option, axis = MAPPED[name]

    def call(q, option):
        parts = attention(q, k, v, **{name: option}, layout=layout, return_lse=True)
        return torch.cat([parts[0].flatten(), parts[1].flatten()])

    wanted = in_turn(call, (None, axis), q, option)
    assert_close(vmap(call, (None, axis))(q, option), wanted, torch.float32)


@pytest.mark.parametrize("torch_dtype", DTYPES, ids=str)
def test_gradients_of_functions(torch_dtype):
    given = tensors(2, 4, 6, 8, dtype=torch_dtype)
    ours = grad(lambda *x: causal(*x).sin().sum(), argnums=(0, 1, 2))(*given)
    eager = leaves(*given)
    causal(*eager).sin().sum().backward()
    for x, wanted in zip(ours, eager, strict=True):
        assert torch.equal(x, wanted.grad)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("torch_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_for_each_item(torch_dtype, has_sinks):
    """Of what is mapped, and of what all items share."""
    q = tensors(3, 4, 5, 8, dtype=torch_dtype)[0]
    shared = [*(x[0] for x in tensors(1, 4, 5, 8, dtype=torch_dtype)[1:]), torch.randn(4, 5, 5)]
    if has_sinks:
        shared.append(torch.randn(4))

    def loss(q, k, v, bias, sinks=None):
        return attention(q, k, v, bias=bias, sinks=sinks, is_causal=True).sin().sum()

    every = tuple(range(len(shared) + 1))
    ours = vmap(grad(loss, argnums=every), (0, *(None for _ in shared)))(q, *shared)
    for i in range(3):
        eager = leaves(q[i], *shared)
        loss(*eager).backward()
        for x, wanted in zip(ours, eager, strict=True):
            assert x[i].dtype == wanted.dtype
            assert_close(x[i], wanted.grad, torch_dtype)


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 2, 4, 5, 8)])
def test_gradients_of_a_map(shape):
    given = [torch.randn(shape, **FLOAT64) for _ in range(3)]
    ours = grad(lambda *x: vmap(scaled_dot_product_attention)(*x).sin().sum(), argnums=(0, 1, 2))
    eager = leaves(*given)
    in_turn(scaled_dot_product_attention, (0, 0, 0), *eager).sin().sum().backward()
    for x, wanted in zip(ours(*given), eager, strict=True):
        assert_close(x, wanted.grad, torch.float64)


def test_second_derivatives_of_functions_are_refused():
    q, k, v = tensors(2, 4, 5, 8)

    def first(q):
        return grad(lambda x: scaled_dot_product_attention(x, k, v).sin().sum())(q).sum()

    with pytest.raises(RuntimeError, match="got a derivative of gradients, expected first deriv"):
        grad(first)(q)


def test_gradients_of_functions_inside_compiled_programs_are_refused():
    q, k, v = tensors(2, 4, 5, 8)

    def call(q):
        return grad(lambda x: scaled_dot_product_attention(x, k, v).sum())(q)

    with pytest.raises(Exception, match="setup_context"):
        compiled(call)(q)


def test_mapped_dropout():
    q, k, v = (torch.stack([x] * 3) for x in tensors(2, 4, 5, 8))

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    out = vmap(call, randomness="different")(q, k, v)
    assert not torch.equal(out[0], out[1])
    torch.manual_seed(0)
    first = vmap(call, randomness="same")(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(first, vmap(call, randomness="same")(q, k, v))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(q, k, v)


def test_forward_mode_of_functions_is_left_to_pytorch():
    q, k, v = tensors(2, 4, 5, 8)
    reasons = []

    def call(q):
        reasons.append(why_not(q, k, v))
        return scaled_dot_product_attention(q, k, v)

    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = jvp(call, (q,), (torch.ones_like(q),))
    assert tangent.shape == q.shape
    assert "forward-mode derivatives" in reasons[0]

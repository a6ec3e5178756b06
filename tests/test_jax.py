"""Promise: JAX can compile, differentiate and map the function of docs/jax.rst."""

import numpy as np
import pytest
from pages import run_page

jax = pytest.importorskip("jax")
jnp = jax.numpy


@pytest.fixture(scope="module")
def attention():
    names, failed = run_page("jax.rst")
    assert failed == 0
    return names["attention"]


def by_jax(q, k, v):
    q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).swapaxes(-3, -2)


def loss_of(function, *options):
    return lambda q, k, v: (function(q, k, v, *options).astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("length", [1, 33, 700])
def test_results_and_gradients(attention, rng, dtype, tolerance, length):
    arrays = jnp.asarray(rng.standard_normal((3, 2, 4, length, 32)), dtype)
    ours = jax.jit(attention, static_argnums=3)(*arrays, True)
    assert ours.dtype == dtype
    found = [ours, *jax.jit(jax.grad(loss_of(attention, True), (0, 1, 2)))(*arrays)]
    wanted = [by_jax(*arrays), *jax.grad(loss_of(by_jax), (0, 1, 2))(*arrays)]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.abs(one - other).max() <= tolerance * max(1.0, np.abs(other).max())


def test_maps_with_shared_keys(attention, rng):
    q = rng.standard_normal((5, 4, 9, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 4, 20, 16), dtype=np.float32)
    mapped = jax.vmap(attention, in_axes=(0, None, None))(q, k, v)
    for one, alone in zip(mapped, q, strict=True):
        np.testing.assert_array_equal(one, attention(alone, k, v))
    gradient = jax.grad(lambda k: jax.vmap(attention, (0, None, None))(q, k, v).sum())(k)
    parts = [jax.grad(lambda k, one=one: attention(one, k, v).sum())(k) for one in q]
    np.testing.assert_allclose(gradient, sum(parts), atol=1e-5)


def test_loops(attention, rng):
    """Layer after layer, in one compiled loop."""
    x = rng.standard_normal((4, 40, 16), dtype=np.float32)

    def step(x, _):
        return attention(x, x, x, True), None

    looped, _ = jax.jit(lambda x: jax.lax.scan(step, x, None, length=3))(x)
    for _ in range(3):
        x = attention(x, x, x, True)
    np.testing.assert_array_equal(looped, x)

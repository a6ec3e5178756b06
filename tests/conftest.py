"""Fixtures for all tests: ISA levels to run on, and random arrays."""

import numpy as np
import pytest
from numattn import _numpy_backend, _runtime

LEVELS = []
if _runtime.native is not None:
    LEVELS = [name for name, available in _runtime.native.isa_names().items() if available]
BACKENDS = ["numpy", *LEVELS]

DTYPES = ["float32", "float64", "float16", "bfloat16"]


def with_dtypes(levels):
    """Return all pairs of level and dtype that run different code."""
    own = {"numpy": ["all"], **_runtime.ISA_LEVELS}
    return [(x, d) for x in levels for d in DTYPES if {"all", d} & set(own[x])]


FLOAT32_LEVELS = [level for level, dtype in with_dtypes(LEVELS) if dtype == "float32"]


def use(name):
    """Compute on one level of the compiled kernels, or in NumPy.

    It does not use the fixture `monkeypatch`: tests with it are not run in several threads.
    """
    if name == "numpy":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_runtime, "attention_common", None)
            patch.setattr(_runtime, "computations", _numpy_backend)
            yield name
        return
    before = _runtime.native.isa()
    _runtime.native.set_isa(name)
    yield name
    _runtime.native.set_isa(before)


@pytest.fixture(params=["numpy", *FLOAT32_LEVELS])
def backend(request):
    """Run the float32 test on every ISA level of this machine, and on the NumPy backend."""
    yield from use(request.param)


@pytest.fixture(params=FLOAT32_LEVELS)
def isa(request):
    """Run the float32 test on every ISA level of this machine."""
    yield from use(request.param)


@pytest.fixture(params=BACKENDS)
def any_backend(request):
    """Run the test, which chooses dtypes itself, on every level and on the NumPy backend."""
    yield from use(request.param)


def named_dtype(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


@pytest.fixture(params=with_dtypes(BACKENDS), ids="-".join)
def dtype(request):
    """Run the test with every dtype, each on every level and on the NumPy backend."""
    for _ in use(request.param[0]):
        yield named_dtype(request.param[1])


@pytest.fixture(params=with_dtypes(LEVELS), ids="-".join)
def native_dtype(request):
    """Run the test with every dtype, each on every level."""
    for _ in use(request.param[0]):
        yield named_dtype(request.param[1])


@pytest.fixture
def rng():
    """Return a generator of random numbers, the same for every run."""
    return np.random.default_rng(20240607)


@pytest.fixture
def arrays(rng):
    """Return a function that makes random q, k and v."""

    def make(*batch, hq=1, hkv=None, lq=5, lk=None, d=8, dv=None, amplitude=1.0, dtype=np.float32):
        hkv = hq if hkv is None else hkv
        lk = lq if lk is None else lk
        dv = d if dv is None else dv
        shapes = ((*batch, hq, lq, d), (*batch, hkv, lk, d), (*batch, hkv, lk, dv))
        return tuple((amplitude * rng.standard_normal(shape)).astype(dtype) for shape in shapes)

    return make

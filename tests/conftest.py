"""What all tests share: ISA levels to run on, and arrays to run with."""

import numpy as np
import pytest
from numattn import _numpy_backend, _runtime

BACKENDS = ["numpy"]
if _runtime.native is not None:
    BACKENDS += [name for name, available in _runtime.native.isa_names().items() if available]


class Backend:
    """One way to compute: a level of the compiled kernels, or NumPy."""

    def __init__(self, name, monkeypatch):
        self.name = name
        if name == "numpy":
            monkeypatch.setattr(_runtime, "attention_common", None)
            monkeypatch.setattr(_runtime, "attention_backend", _numpy_backend.attention)
        else:
            before = _runtime.native.isa()
            _runtime.native.set_isa(name)
            self.restore = lambda: _runtime.native.set_isa(before)

    def restore(self):
        pass


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Run the test on every ISA level of this machine, and on the NumPy backend."""
    backend = Backend(request.param, monkeypatch)
    yield backend.name
    backend.restore()


@pytest.fixture(params=[name for name in BACKENDS if name != "numpy"])
def isa(request, monkeypatch):
    """Run the test on every ISA level of this machine."""
    backend = Backend(request.param, monkeypatch)
    yield backend.name
    backend.restore()


@pytest.fixture
def rng():
    """Return a generator of random numbers, the same for every run."""
    return np.random.default_rng(20240607)


@pytest.fixture
def arrays(rng):
    """Return a function that makes random q, k and v."""

    def make(*batch, hq=1, hkv=None, lq=5, lk=None, d=8, dv=None, amplitude=1.0):
        hkv = hq if hkv is None else hkv
        lk = lq if lk is None else lk
        dv = d if dv is None else dv
        shapes = ((*batch, hq, lq, d), (*batch, hkv, lk, d), (*batch, hkv, lk, dv))
        return tuple((amplitude * rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)

    return make

from typing import Any

from numpy.typing import NDArray

from numattn._arguments import Arguments
from numattn._gradient_arguments import GradientArguments
from numattn._projection import Product

def attention_common(
    q: object,
    k: object,
    v: object,
    mask: object,
    tail_mask: object,
    bias: object,
    is_causal: object,
    q_offset: object,
    window: object,
    scale: object,
    softcap: object,
    alibi_slopes: object,
    sinks: object,
    kv_lengths: object,
    q_lengths: object,
    layout: object,
    return_lse: object,
    out: object,
    num_threads: object,
    k_scale: object,
    v_scale: object,
    dropout: object,
    rng: object,
    scales_are_finite: bool = False,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]] | None: ...
def attention(arguments: Arguments) -> None: ...
def attention_backward(arguments: GradientArguments) -> None: ...
def stage(arguments: Arguments, name: str, out: NDArray[Any]) -> None: ...
def softmax(scores: NDArray[Any], mask: NDArray[Any] | None, out: NDArray[Any]) -> None: ...
def rotate(
    x: NDArray[Any],
    cos: NDArray[Any],
    sin: NDArray[Any],
    out: NDArray[Any],
    interleaved: bool,
    num_threads: int | None = None,
) -> None: ...
def multiply(products: list[Product], num_threads: int | None = None) -> None: ...
def activate(
    name: str,
    a: NDArray[Any],
    times: NDArray[Any] | None,
    out: NDArray[Any],
    num_threads: int | None = None,
) -> None: ...
def activate_back(
    name: str,
    d: NDArray[Any],
    a: NDArray[Any],
    times: NDArray[Any] | None,
    out: NDArray[Any],
    d_a: NDArray[Any],
    d_times: NDArray[Any] | None,
    num_threads: int | None = None,
) -> None: ...
def normalize(
    x: NDArray[Any],
    add: NDArray[Any] | None,
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    epsilon: float,
    is_centred: bool,
    out: NDArray[Any],
    num_threads: int | None = None,
) -> None: ...
def normalize_back(
    d: NDArray[Any],
    x: NDArray[Any],
    weight: NDArray[Any],
    epsilon: float,
    is_centred: bool,
    of_weight: NDArray[Any],
    of_bias: NDArray[Any] | None,
    num_threads: int | None = None,
) -> None: ...
def set_default_num_threads(num_threads: int) -> None: ...
def get_default_num_threads() -> int: ...
def cpu_name() -> str: ...
def isa_names() -> dict[str, bool]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def exp2(x: NDArray[Any], y: NDArray[Any]) -> None: ...
def multiply_adds(rounds: int, dtype: str = "float32") -> float: ...
def read_floats(x: NDArray[Any]) -> float: ...

__test__: dict[str, str]

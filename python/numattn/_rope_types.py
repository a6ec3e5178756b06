"""Frequencies of rotary embedding, for the types of scaling in models' configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import as_array, flag, is_real, kind_of, real, refuse, refuse_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Frequencies = NDArray[np.float64]

_BASE = 10000.0
# Keys that any mapping may have, in addition to the keys of its type.
_COMMON = ("rope_theta", "partial_rotary_factor")
# Keys in the mappings of some models that have no effect, like keys of other types.
_IGNORED = ("finetuned",)
# Keys whose value 0 means the default.
_ZERO_IS_NONE = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Waves:
    """The factors of positions, and the factor of cosines and sines."""

    frequencies: Frequencies  # (rotary_dim / 2,), radians per position
    attention_factor: float


@dataclass(frozen=True, slots=True)
class RopeType:
    """A type of scaling with checked numbers; `waves` takes the rest when it is known."""

    name: str
    values: dict[str, Any]
    base: float

    def waves(self, rotary_dim: int, length: int) -> Waves:
        """Return frequencies for texts of `length` tokens."""
        return _TYPES[self.name][1](self.values, self.base, rotary_dim, length)


def rope_type(scaling: Mapping[str, Any] | None, base: float | None) -> tuple[RopeType, float]:
    """Check mapping and base; return the type, and the share of a vector that is rotated."""
    given: dict[str, Any] = {}
    if scaling is not None:
        try:
            given = dict(scaling)
        except (TypeError, ValueError):
            seen = kind_of(scaling)
            refuse_kind("scaling", seen, "a mapping, such as {'rope_type': 'linear', ...}")
    names = {given.pop(key) for key in ("rope_type", "type") if given.get(key) is not None}
    for key in ("rope_type", "type"):
        given.pop(key, None)
    if len(names) > 1:
        seen = f"different rope_type and type ({', '.join(sorted(map(repr, names)))})"
        refuse("scaling", seen, "only one of them")
    if not names and scaling is not None and not set(_COMMON) & set(given):
        refuse("scaling", "no 'rope_type'", "'rope_type': one of " + ", ".join(map(repr, _TYPES)))
    name = names.pop() if names else "default"
    if name not in _TYPES:
        refuse("scaling", f"rope_type {name!r}", "one of " + ", ".join(map(repr, _TYPES)))
    theta, share = given.pop("rope_theta", None), given.pop("partial_rotary_factor", None)
    known = _TYPES[name][0]
    takes_any = {*_IGNORED, *(key for keys, _ in _TYPES.values() for key in keys)}
    for key in given:
        if key not in takes_any:
            wanted = ", ".join([*_COMMON, *known])
            refuse("scaling", repr(key), f"only {wanted} with rope_type {name!r}")
    values = {key: _value(key, given.get(key), default, name) for key, default in known.items()}
    if name == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        seen = "low_freq_factor {low_freq_factor} and high_freq_factor {high_freq_factor}"
        refuse("scaling", seen.format(**values), "a low_freq_factor below high_freq_factor")
    base_ = _base(base, theta)
    if name == "yarn":
        if base_ <= 1:  # yarn divides by its logarithm
            refuse("base", f"{base_:g}", "more than 1 with rope_type 'yarn'")
        if values["factor"] is None and values["max_position_embeddings"] is None:
            expected = "one of them for rope_type 'yarn'"
            refuse("scaling", "neither 'factor' nor 'max_position_embeddings'", expected)
    if name == "longrope" and values["original_max_position_embeddings"] <= 1:
        seen = f"{values['original_max_position_embeddings']:g}"
        refuse("scaling['original_max_position_embeddings']", seen, "more than 1 token")
    share = 1.0 if share is None else _share(share)
    if name == "proportional":  # it counts pairs in whole vectors
        values["share"], share = share, 1.0
    return RopeType(name, values, base_), share


def _base(base: float | None, theta: object) -> float:
    numbers = {}
    for name, value in (("base", base), ("scaling['rope_theta']", theta)):
        if value is not None:
            numbers[name] = real(name, value)
            if not numbers[name] > 0:
                refuse(name, str(value), "a positive number")
    if len(set(numbers.values())) > 1:
        seen = " and ".join(f"{name} {value}" for name, value in numbers.items())
        refuse("base", seen, "only one of them, or the same number")
    return next(iter(numbers.values()), _BASE)


def _share(value: object) -> float:
    share = real("scaling['partial_rotary_factor']", value)
    if not 0 < share <= 1:
        expected = "a number above 0 and at most 1"
        refuse("scaling['partial_rotary_factor']", str(value), expected)
    return share


def _value(key: str, value: Any, default: Any, type_name: str) -> Any:
    name = f"scaling[{key!r}]"
    if value is not None and key in _ZERO_IS_NONE and real(name, value) == 0:
        value = None
    if value is None:
        if default is _REQUIRED:
            refuse(name, "nothing", f"a value, which rope_type {type_name!r} needs")
        return default
    if key == "truncate":
        return flag(name, value)
    if key in ("short_factor", "long_factor"):
        factors = as_array(name, value)
        if factors.ndim != 1 or not is_real(factors.dtype):
            seen = f"an array of dtype {factors.dtype} and shape {factors.shape}"
            refuse_kind(name, seen, "a list of numbers")
        if not np.all(np.isfinite(factors) & (factors > 0)):
            seen = "a number that is not finite or not positive"
            refuse(name, seen, "finite positive numbers")
        return tuple(factors.astype(np.float64).tolist())
    number = real(name, value)
    if not number > 0:
        refuse(name, str(value), "a positive number")
    return number


def _plain(base: float, rotary_dim: int) -> Frequencies:
    frequencies: Frequencies = base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return frequencies


def _default(values: dict[str, Any], base: float, rotary_dim: int, length: int) -> Waves:
    return Waves(_plain(base, rotary_dim), 1.0)


def _linear(values: dict[str, Any], base: float, rotary_dim: int, length: int) -> Waves:
    return Waves(_plain(base, rotary_dim) / values["factor"], 1.0)


def _proportional(values: dict[str, Any], base: float, rotary_dim: int, length: int) -> Waves:
    """Rotate a share of the pairs; the others have a frequency of 0."""
    frequencies = _plain(base, rotary_dim) / values["factor"]
    frequencies[int(values["share"] * rotary_dim // 2) :] = 0
    return Waves(frequencies, 1.0)


def _dynamic(values: dict[str, Any], base: float, rotary_dim: int, length: int) -> Waves:
    """Stretch the waves in proportion to how much longer the text is than training texts."""
    factor, trained = values["factor"], values["max_position_embeddings"]
    stretch = factor * max(length, trained) / trained - (factor - 1)
    power = rotary_dim / (rotary_dim - 2) if rotary_dim > 2 else 1.0
    return Waves(_plain(base * stretch**power, rotary_dim), 1.0)


def _llama3(values: dict[str, Any], base: float, rotary_dim: int, length: int) -> Waves:
    """Slow down the waves that turned only a few times in a training text."""
    frequencies = _plain(base, rotary_dim)
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    seen = values["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = np.clip((seen - low) / (high - low), 0, 1)
    return Waves(frequencies * (share + (1 - share) / values["factor"]), 1.0)


def _yarn(values: dict[str, Any], base: float, rotary_dim: int, length: int) -> Waves:
    """Slow down the waves that turned less than `beta_slow` times in a training text, keep those
    that turned more than `beta_fast` times, and interpolate between them."""
    trained = values["original_max_position_embeddings"]
    stretch = values["factor"]
    if stretch is None:
        stretch = values["max_position_embeddings"] / trained

    def pair_of(times: float) -> float:
        return rotary_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(values["beta_fast"]), pair_of(values["beta_slow"])
    if values["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a division by 0
    slow = np.clip((np.arange(rotary_dim // 2) - first) / (last - first), 0, 1)
    frequencies = _plain(base, rotary_dim)
    frequencies = frequencies * (1 - slow) + frequencies / stretch * slow

    def temperature(scale: float) -> float:
        return 1.0 if stretch <= 1 else 0.1 * scale * math.log(stretch) + 1.0

    factor = values["attention_factor"]
    if factor is None:
        factor = temperature(1.0)
        if values["mscale"] is not None and values["mscale_all_dim"] is not None:
            factor = temperature(values["mscale"]) / temperature(values["mscale_all_dim"])
    return Waves(frequencies, factor)


def _longrope(values: dict[str, Any], base: float, rotary_dim: int, length: int) -> Waves:
    """Divide each wave by its own factor; long texts have other factors than short texts."""
    trained = values["original_max_position_embeddings"]
    name = "long_factor" if length > trained else "short_factor"
    if len(values[name]) != rotary_dim // 2:
        seen = f"{len(values[name])} numbers"
        refuse(f"scaling[{name!r}]", seen, f"{rotary_dim // 2}, one per pair")
    stretch, factor = values["factor"], values["attention_factor"]
    if stretch is None and values["max_position_embeddings"] is not None:
        stretch = values["max_position_embeddings"] / trained
    if factor is None:
        if stretch is None:
            seen = "none of 'attention_factor', 'factor' and 'max_position_embeddings'"
            refuse("scaling", seen, "one of them")
        factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(trained))
    return Waves(_plain(base, rotary_dim) / np.array(values[name]), factor)


# For each type its numbers, with their defaults, and the function that makes its frequencies.
_TYPES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any], float, int, int], Waves]]] = {
    "default": ({}, _default),
    "linear": ({"factor": _REQUIRED}, _linear),
    "proportional": ({"factor": 1.0}, _proportional),
    "dynamic": ({"factor": _REQUIRED, "max_position_embeddings": _REQUIRED}, _dynamic),
    # The defaults are those in the configurations of Llama 3 models.
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        _llama3,
    ),
    "yarn": (
        {
            "factor": None,
            "original_max_position_embeddings": _REQUIRED,
            "max_position_embeddings": None,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
        },
        _yarn,
    ),
    "longrope": (
        {
            "short_factor": _REQUIRED,
            "long_factor": _REQUIRED,
            "original_max_position_embeddings": _REQUIRED,
            "factor": None,
            "attention_factor": None,
            "max_position_embeddings": None,
        },
        _longrope,
    ),
}

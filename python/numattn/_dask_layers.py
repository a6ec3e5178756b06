"""Tasks in trees and layers, and dask arrays made from them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import Task, TaskRef

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Key = tuple[Any, ...]
    Tasks = dict[Key, Task]


def inner_key(key: Key, depth: int, n: int) -> Key:
    """Return the key of a partial task for the task `key`, in the layer of partial tasks."""
    return (inner_name(key[0]), *key[1:], depth, n)


def inner_name(name: str) -> str:
    what, _, token = name.rpartition("-")
    return f"{what}-part-{token}"


def groups(parts: Sequence[Any], most: int) -> Iterator[tuple[Any, ...]]:
    for first in range(0, len(parts), most):
        yield tuple(parts[first : first + most])


def tree(parts: Sequence[Key], key: Key, split_every: int) -> Iterator[tuple[Key, tuple[Key, ...]]]:
    """Yield the nodes of a tree over parts: the key of each, and the parts that it merges.

    The key of the last node is `key`.
    """
    for depth in itertools.count(1):
        if len(parts) == 1:
            return
        merged = list(groups(parts, split_every))
        parts = [inner_key(key, depth, n) for n in range(len(merged))]
        if len(merged) == 1:
            parts = [key]
        yield from zip(parts, merged, strict=True)


def graph_of(inputs: Sequence[da.Array], name: str, tasks: Tasks) -> HighLevelGraph:
    """Return the graph of these arrays, extended by tasks that read them."""
    return with_tasks(HighLevelGraph.merge(*(x.dask for x in inputs)), name, tasks)


def with_tasks(below: HighLevelGraph, name: str, tasks: Tasks) -> HighLevelGraph:
    """Extend a graph by tasks in layers: a layer of this name, and one of its partial tasks."""
    layers: dict[str, Any] = {name: {}}
    reads: dict[str, set[str]] = {name: set()}
    for key, task in tasks.items():
        layers.setdefault(key[0], {})[key] = task
        reads.setdefault(key[0], set()).update(read[0] for read in task.dependencies)
    for layer, of in reads.items():
        of.discard(layer)  # trees are within a layer
    return HighLevelGraph({**below.layers, **layers}, {**below.dependencies, **reads})


def picked(
    graph: HighLevelGraph,
    layer: str,
    axes: int,
    n: int,
    name: str,
    chunks: tuple[tuple[int, ...], ...],
    dtype: np.dtype[Any],
) -> da.Array:
    """Return the n-th arrays of the tuples in a layer as a dask array; keys of the layer have only
    the first `axes` axes of the array."""
    tasks: Tasks = {}
    for index in np.ndindex(*map(len, chunks)):
        key = (name, *index)
        tasks[key] = Task(key, pick, TaskRef((layer, *index[:axes])), n)
    return array(with_tasks(graph, name, tasks), name, chunks, dtype)


def pick(parts: Sequence[Any], n: int) -> Any:
    return parts[n]


def array(
    graph: HighLevelGraph, name: str, chunks: tuple[tuple[int, ...], ...], dtype: np.dtype[Any]
) -> da.Array:
    return da.Array(graph, name, chunks, meta=np.empty((0,) * len(chunks), dtype))

"""The graph of `numattn.dask.attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask.base import tokenize
from dask.task_spec import List, Task, TaskRef

from . import _dask_tasks
from ._checks import precision_of
from ._dask_inputs import starts
from ._dask_layers import array, graph_of, groups, inner_key, picked, tree

if TYPE_CHECKING:
    import dask.array as da

    from ._dask_layers import Key, Tasks
    from ._dask_problem import Meeting, Problem


def attention(problem: Problem, return_lse: bool) -> da.Array | tuple[da.Array, da.Array]:
    """Return the result and, if wanted, its log-sum-exp."""
    token = tokenize(problem.token, return_lse)
    name = f"attention-both-{token}" if return_lse else f"attention-{token}"
    tasks: Tasks = {}
    for of in problem.meetings:
        index = problem.result_index(of)
        key = (name, *index[:-1]) if return_lse else (name, *index)
        _add_result(problem, tasks, of, key, "both" if return_lse else "out")
    graph = graph_of(problem.inputs, name, tasks)
    chunks, dtype = problem.result_chunks, problem.dtype
    if not return_lse:
        return array(graph, name, chunks, dtype)
    axes = len(chunks) - 1
    precision = precision_of(dtype)
    return (
        picked(graph, name, axes, 0, f"attention-out-{token}", chunks, dtype),
        picked(graph, name, axes, 1, f"attention-lse-{token}", chunks[:-1], precision),
    )


def _add_result(problem: Problem, tasks: Tasks, of: Meeting, key: Key, gives: str) -> None:
    """Add the tasks for one chunk of the result: folds over chunks of keys, and a tree that merges
    their states."""
    if not of.keys:
        tasks[key] = Task(key, _dask_tasks.without_keys, of.rows, gives)
        return
    folded = list(groups(of.keys, problem.split_every))
    states = [inner_key(key, 0, n) for n in range(len(folded))] if len(folded) > 1 else [key]
    for n, (own, keys) in enumerate(zip(states, folded, strict=True)):
        with_sinks = n == 0 and of.rows.sinks is not None
        tasks[own] = _fold(problem, of, own, keys, with_sinks, gives if own == key else "state")
    for own, parts in tree(states, key, problem.split_every):
        merged = List(*map(TaskRef, parts))
        given = gives if own == key else "state"
        tasks[own] = Task(own, _dask_tasks.merge, of.rows, merged, given)


def _fold(
    problem: Problem, of: Meeting, own: Key, keys: tuple[int, ...], with_sinks: bool, gives: str
) -> Task:
    def all_of(part: Any, is_there: bool = True) -> List:
        return List(*(part(of, key) for key in keys if is_there))

    key_starts = starts(problem.chunks.keys)
    return Task(
        own,
        _dask_tasks.fold,
        of.rows,
        problem.query_part(problem.q, of),
        all_of(problem.k_part),
        all_of(problem.v_part),
        all_of(problem.mask_part, problem.mask is not None),
        all_of(problem.bias_part, problem.bias is not None),
        [slice(*key_starts[key : key + 2]) for key in keys],
        with_sinks,
        gives,
    )

"""The graph of `numattn.dask.attention_backward`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.base import tokenize
from dask.task_spec import List, Task, TaskRef

from . import _dask_tasks
from ._checks import precision_of
from ._dask_inputs import chunked, given, of_one_element, starts
from ._dask_layers import graph_of, inner_key, pick, picked, tree, with_tasks
from ._gradient_arguments import like_lse, like_out

if TYPE_CHECKING:
    import dask.array as da

    from ._dask_layers import Key, Tasks
    from ._dask_problem import Meeting, Problem


@dataclass
class Results:
    """The results and their gradients that `attention_backward` takes, chunked like the result."""

    out: da.Array
    lse: da.Array
    dout: da.Array
    dlse: da.Array | None

    @property
    def arrays(self) -> list[da.Array]:
        return [x for x in (self.out, self.lse, self.dout, self.dlse) if x is not None]

    def parts(self, problem: Problem, of: Meeting) -> tuple[Any, ...]:
        """Return the chunks for a chunk of queries, in the order of the tasks' arguments."""
        return (
            problem.query_part(self.out, of),
            problem.lse_part(self.lse, of),
            problem.query_part(self.dout, of),
            None if self.dlse is None else problem.lse_part(self.dlse, of),
        )


def check_results(problem: Problem, dout: Any, out: Any, lse: Any, dlse: Any) -> Results:
    """Check the results of `attention`, and the gradients with respect to them."""

    def result(name: str, x: Any, is_lse: bool) -> da.Array:
        of_dask = given(name, x)
        check = like_lse if is_lse else like_out
        check(problem.checked, name, of_one_element(of_dask))
        chunks = problem.result_chunks
        return chunked(of_dask, chunks[:-1] if is_lse else chunks)

    return Results(
        out=result("out", out, False),
        lse=result("lse", lse, True),
        dout=result("dout", dout, False),
        dlse=None if dlse is None else result("dlse", dlse, True),
    )


def attention_backward(problem: Problem, results: Results) -> dict[str, da.Array]:
    """Return the gradients by the names of the inputs."""
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    if problem.checked.bias is not None and problem.bias is not None:
        inputs["bias"] = problem.bias
    dtypes = [x.dtype for x in inputs.values()], problem.checked.sinks
    token = tokenize(problem.token, results.arrays, list(inputs), dtypes)
    # If chunks of k and v match, so do their gradients.
    is_one = problem.k.numblocks == problem.v.numblocks
    groups = [("q",), *([("k", "v")] if is_one else [("k",), ("v",)])]
    groups += [("bias",)] if "bias" in inputs else []
    pairs, added_to = _pairs(problem, results, f"attention-backward-{token}", groups)
    read = [*problem.inputs, *results.arrays]
    graph = graph_of(read, f"attention-backward-{token}", pairs)
    gradients: dict[str, da.Array] = {}
    for n, group in enumerate(groups):
        name = f"attention-gradient-{'-'.join(group)}-{token}"
        first = inputs[group[0]]
        sums = _Sums(
            chunks=[inputs[x].chunks for x in group],
            dtypes=[inputs[x].dtype for x in group],
            precision=precision_of(problem.dtype),
            split_every=problem.split_every,
        )
        tasks: Tasks = {}
        for index in np.ndindex(*first.numblocks):
            parts: list[Key] = []
            for pair in added_to[n, index]:
                part = inner_key((name, *index), 0, len(parts))
                tasks[part] = Task(part, pick, TaskRef(pair), n)
                parts.append(part)
            sums.add_to(tasks, (name, *index), parts)
        summed = with_tasks(graph, name, tasks)
        for m, x in enumerate(group):
            own = f"attention-gradient-of-{x}-{token}"
            of = inputs[x]
            gradients[x] = picked(summed, name, of.ndim, m, own, of.chunks, of.dtype)
    if problem.checked.sinks is not None:
        gradients["sinks"] = _of_sinks(problem, results, token)
    return gradients


def _pairs(
    problem: Problem, results: Results, name: str, groups: list[tuple[str, ...]]
) -> tuple[Tasks, dict[Any, list[Key]]]:
    """Return a task for each pair of chunks, and for each chunk of a group the tasks that add to
    it."""
    tasks: Tasks = {}
    added_to: dict[Any, list[Key]] = defaultdict(list)
    key_starts = starts(problem.chunks.keys)
    for of in problem.meetings:
        q, of_results = problem.query_part(problem.q, of), results.parts(problem, of)
        for key in of.keys:
            own = (name, *of.batch, of.head, of.query, key)
            read: dict[str, Any] = {
                "q": q,
                "k": problem.k_part(of, key),
                "v": problem.v_part(of, key),
                "bias": problem.bias_part(of, key),
            }
            tasks[own] = Task(
                own, _dask_tasks.pair_gradients, of.rows, groups, *read.values(),
                problem.mask_part(of, key), slice(*key_starts[key : key + 2]), *of_results,
            )  # fmt: skip
            for n, group in enumerate(groups):
                added_to[n, read[group[0]].key[1:]].append(own)
    return tasks, added_to


def _of_sinks(problem: Problem, results: Results, token: str) -> da.Array:
    name = f"attention-gradient-sinks-{token}"
    tasks: Tasks = {}
    parts: dict[int, list[Key]] = defaultdict(list)
    for of in problem.meetings:
        part = inner_key((name, of.head), 0, len(parts[of.head]))
        tasks[part] = Task(part, _dask_tasks.sink_gradients, of.rows, *results.parts(problem, of))
        parts[of.head].append(part)
    chunks, dtype = (problem.chunks.heads,), problem.checked.sinks
    assert dtype is not None
    sums = _Sums([chunks], [dtype], np.dtype(np.float64), problem.split_every)
    for head in range(len(problem.chunks.heads)):
        sums.add_to(tasks, (name, head), parts[head])
    graph = graph_of(results.arrays, name, tasks)
    return picked(graph, name, 1, 0, f"attention-gradient-of-sinks-{token}", chunks, dtype)


@dataclass
class _Sums:
    """Sums of tuples of arrays, added up in trees and rounded to the dtypes at the end."""

    chunks: list[tuple[tuple[int, ...], ...]]
    dtypes: list[np.dtype[Any]]
    precision: np.dtype[Any]
    split_every: int

    def add_to(self, tasks: Tasks, key: Key, parts: list[Key]) -> None:
        """Add the tasks that sum up parts; without parts the sum is 0."""
        if not parts:
            shapes = [
                tuple(sizes[i] for sizes, i in zip(chunks, key[1:], strict=True))
                for chunks in self.chunks
            ]
            tasks[key] = Task(key, _dask_tasks.zeros, shapes, self.dtypes)
            return
        nodes = tree(parts, key, self.split_every) if len(parts) > 1 else [(key, tuple(parts))]
        inner = [self.precision] * len(self.dtypes)
        for own, some in nodes:
            dtypes = self.dtypes if own == key else inner
            tasks[own] = Task(own, _dask_tasks.add, List(*map(TaskRef, some)), dtypes)

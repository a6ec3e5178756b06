"""Graphs of one node, for the tests that compare with ONNX. The package is imported in a call."""

from itertools import count


def one_node(op_type, inputs, outputs=1, *, domain="", attributes=None):
    """Return a model of one node, and what to feed it with.

    An input of None is left out. `outputs` is how many there are, or which have a name.
    """
    import onnx
    from onnx import helper

    names = [f"input{i}" for i in range(len(inputs))]
    feeds = {name: x for name, x in zip(names, inputs, strict=True) if x is not None}
    in_names = [name if name in feeds else "" for name in names]
    while in_names and not in_names[-1]:
        in_names.pop()
    named = [True] * outputs if isinstance(outputs, int) else outputs
    out_names = [f"output{i}" if name else "" for i, name in zip(count(), named, strict=False)]
    node = helper.make_node(op_type, in_names, out_names, domain=domain, **(attributes or {}))
    graph = helper.make_graph(
        [node], op_type,
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in feeds.items()
        ],
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in out_names if name
        ],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21 if domain else 25)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds

"""Which outputs of a graph depend on its inputs."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def outputs_of_inputs(graph: ir.Graph) -> set[str]:
    """Names of the outputs that some input reaches; all others are constants of the model."""
    reached: set[ir.Value] = set(graph.inputs)
    for node in graph:  # in topological order
        if any(value in reached for value in _reads(node)):
            reached |= set(node.outputs)
    return {str(value.name) for value in graph.outputs if value in reached}


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, by itself or in its subgraphs."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        bodies = (
            (attribute.as_graph(),)
            if attribute.type == ir.AttributeType.GRAPH
            else attribute.as_graphs()
            if attribute.type == ir.AttributeType.GRAPHS
            else ()
        )
        for body in bodies:
            yield from body.outputs
            for inner in body:
                yield from _reads(inner)

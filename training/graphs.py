"""Torch modules to ONNX graphs and back: names kept, weights stored as FP16, arithmetic in FP32.

Each FP16 initialiser bears the name of the torch parameter it holds and feeds a Cast to FP32, which ONNX Runtime folds
when it loads the graph. So a graph is also the only stored copy of the weights. Writes no file. Called by `export`.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import compose, helper, numpy_helper
from torch import Tensor, nn

from training.errors import DataError
from training.stages import STAGES, Wiring

OPSET = 17


def stage_graph(
    module: nn.Module, names: tuple[tuple[str, ...], tuple[str, ...]], inputs: Sequence[Tensor]
) -> onnx.ModelProto:
    """Exports a fused module in evaluation mode with a free batch axis.

    `names` are those of its inputs and outputs, `inputs` example tensors of batch 2.
    """
    names_in, names_out = names
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter by tracing keeps parameter names and needs no further package; torch announces its end.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module.eval(),
            tuple(inputs),
            buffer,  # type: ignore[arg-type]  # the tracing exporter takes a stream, its annotation says path
            dynamo=False,
            opset_version=OPSET,
            # Folding would merge parameters into nameless constants; ONNX Runtime folds when it loads the graph.
            do_constant_folding=False,
            input_names=list(names_in),
            output_names=list(names_out),
            dynamic_axes={name: {0: "batch"} for name in names_in + names_out},
        )
    model = onnx.load_from_string(buffer.getvalue())
    _restore_shared(model.graph, {name for name, _ in module.named_parameters()})
    _store_as_fp16(model.graph, {name for name, _ in module.named_parameters()})
    _fix_shapes(model, [value.shape[1:] for value in inputs])
    onnx.checker.check_model(model, full_check=True)
    return model


def parameters_of(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The FP16 initialisers as float32 tensors by parameter name."""
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    return {
        name: torch.from_numpy(array.astype(np.float32)) for name, array in weights.items() if array.dtype == np.float16
    }


def fill_parameters(module: nn.Module, model: onnx.ModelProto, where: str) -> None:
    """Copies the graph's weights into a fused module; raises DataError naming `where` if they do not fit it."""
    try:
        module.load_state_dict(parameters_of(model))
    except RuntimeError as error:
        raise DataError(f"graph '{where}': its weights do not fit this version's network; export it again") from error


def joined(graphs: dict[str, onnx.ModelProto], wiring: Wiring) -> onnx.ModelProto:
    """The four stages as one graph: `image` to `map_score`, `descriptor`, `anomaly_map`."""
    staged = {stage: compose.add_prefix(graphs[stage], f"{stage}/") for stage in STAGES}
    whole = staged["teacher"]
    for stage in STAGES[1:]:
        produced = {output.name for output in whole.graph.output}
        links = [(_producer(produced, name), f"{stage}/{name}") for name in wiring[stage][0]]
        kept = sorted(produced | {output.name for output in staged[stage].graph.output})
        whole = compose.merge_models(whole, staged[stage], io_map=links, outputs=kept)
    _rename(whole.graph, {"teacher/image": "image"})
    wanted = {"map/map_score": "map_score", "bottleneck/descriptor": "descriptor", "map/anomaly_map": "anomaly_map"}
    outputs = {output.name: output for output in whole.graph.output}
    del whole.graph.output[:]
    whole.graph.output.extend(outputs[name] for name in wanted)
    _rename(whole.graph, wanted)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _producer(produced: set[str], name: str) -> str:
    return next(output for output in produced if output.split("/", 1)[1] == name)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in [*graph.input, *graph.output, *graph.value_info]:
        value.name = names.get(value.name, value.name)


def _restore_shared(graph: onnx.GraphProto, parameters: set[str]) -> None:
    """Undoes the exporter's sharing of equal weights, which leaves Identity nodes in place of parameters."""
    held = {i.name: i for i in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Identity" and n.output[0] in parameters]:
        copy = onnx.TensorProto()
        copy.CopyFrom(held[node.input[0]])
        copy.name = node.output[0]
        graph.initializer.append(copy)
        graph.node.remove(node)


def _store_as_fp16(graph: onnx.GraphProto, parameters: set[str]) -> None:
    stored = [i for i in graph.initializer if i.name in parameters]
    if {i.name for i in stored} != parameters:
        missing = sorted(parameters - {i.name for i in stored})
        raise DataError(f"graph: the exporter lost the parameters {missing}")
    casts = [
        helper.make_node("Cast", [i.name], [f"{i.name}.fp32"], f"{i.name}.cast", to=onnx.TensorProto.FLOAT)
        for i in stored
    ]
    for node in graph.node:
        node.input[:] = [f"{name}.fp32" if name in parameters else name for name in node.input]
    for initializer in stored:
        half = numpy_helper.to_array(initializer).astype(np.float16)
        initializer.CopyFrom(numpy_helper.from_array(half, initializer.name))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _fix_shapes(model: onnx.ModelProto, shapes: Sequence[Sequence[int]]) -> None:
    """Writes fixed sizes for every axis but the batch, so that a server can check requests against the graph."""
    for value, shape in zip(model.graph.input, shapes, strict=True):
        for axis, size in enumerate(shape, start=1):
            value.type.tensor_type.shape.dim[axis].dim_value = size

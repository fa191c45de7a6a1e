"""What `logicrd deepstream render` writes, read again: nvinferserver's protobuf text, the graph's YAML, the mux's file.

DeepStream is not here, so its checkers are not either. The schemas below are ours, of the parts that are used, by
names, types and numbers read in DeepStream 9.1 (github.com/NVIDIA/DeepStream: includes/nvdsinferserver_*.proto at
c3989bd and 3503348; src/gst-plugins/gst-nvmultiurisrcbin at 0e05420). They refuse every name that is not in them.
"""

from __future__ import annotations

import configparser
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from pipeline import config as configuration
from pipeline.app import read_manifests
from pipeline.deepstream import render, write
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy/deepstream/example"
AT = Path("/opt/logicrd/deepstream")
LINE = ROOT / "deploy/deepstream/line.yaml"

ENUMS = {
    "MediaFormat": ["MEDIA_FORMAT_NONE", "IMAGE_FORMAT_RGB", "IMAGE_FORMAT_BGR", "IMAGE_FORMAT_GRAY"],
    "TensorOrder": ["TENSOR_ORDER_NONE", "TENSOR_ORDER_LINEAR", "TENSOR_ORDER_NHWC"],
    "FrameScalingHW": ["FRAME_SCALING_HW_DEFAULT", "FRAME_SCALING_HW_GPU", "FRAME_SCALING_HW_VIC"],
    "MemoryType": ["MEMORY_TYPE_DEFAULT", "MEMORY_TYPE_CPU", "MEMORY_TYPE_GPU"],
    "ProcessMode": ["PROCESS_MODE_DEFAULT", "PROCESS_MODE_FULL_FRAME", "PROCESS_MODE_CLIP_OBJECTS"],
    "TensorDataType": [f"TENSOR_DT_{name}" for name in ("NONE", "FP32", "FP16", "INT8", "INT16", "INT32", "UINT8")],
}
# Message: field, number, type; `*` marks what may stand several times.
MESSAGES = {
    "PluginControl": [
        ("infer_config", 1, "InferenceConfig"),
        ("input_control", 2, "InputControl"),
        ("output_control", 3, "OutputControl"),
    ],
    "InputControl": [("process_mode", 1, "ProcessMode"), ("operate_on_gie_id", 2, "int32"), ("interval", 4, "uint32")],
    "OutputControl": [("output_tensor_meta", 1, "bool")],
    "InferenceConfig": [
        ("unique_id", 1, "uint32"),
        ("gpu_ids", 2, "int32*"),
        ("max_batch_size", 3, "uint32"),
        ("backend", 4, "BackendParams"),
        ("preprocess", 5, "PreProcessParams"),
        ("postprocess", 6, "PostProcessParams"),
    ],
    "BackendParams": [
        ("inputs", 1, "InputLayer*"),
        ("outputs", 2, "OutputLayer*"),
        ("triton", 4, "TritonParams"),
        ("output_mem_type", 5, "MemoryType"),
    ],
    "InputLayer": [("name", 1, "string"), ("dims", 2, "int32*"), ("data_type", 3, "TensorDataType")],
    "OutputLayer": [("name", 1, "string"), ("max_buffer_bytes", 2, "uint64")],
    "TritonParams": [("model_name", 1, "string"), ("version", 2, "int64"), ("grpc", 5, "TritonGrpcParams")],
    "TritonGrpcParams": [("url", 1, "string"), ("enable_cuda_buffer_sharing", 2, "bool")],
    "PreProcessParams": [
        ("network_format", 1, "MediaFormat"),
        ("tensor_order", 2, "TensorOrder"),
        ("tensor_name", 3, "string"),
        ("maintain_aspect_ratio", 4, "int32"),
        ("frame_scaling_hw", 5, "FrameScalingHW"),
        ("frame_scaling_filter", 6, "uint32"),
        ("normalize", 7, "ScaleNormalize"),
        ("symmetric_padding", 8, "int32"),
    ],
    "ScaleNormalize": [("scale_factor", 1, "float"), ("channel_offsets", 2, "float*"), ("mean_file", 3, "string")],
    "PostProcessParams": [("other", 5, "OtherNetworkParams")],
    "OtherNetworkParams": [("type_name", 1, "string")],
}
PROPERTIES: dict[str, dict[str, type]] = {
    "nvmultiurisrcbin": {
        "ip-address": str,
        "port": str,
        "max-batch-size": int,
        "live-source": bool,
        "drop-pipeline-eos": bool,
        "attach-sys-ts": bool,
        "select-rtp-protocol": int,
        "latency": int,
        "rtsp-reconnect-interval": int,
        "rtsp-reconnect-attempts": int,
        "disable-audio": bool,
        "config-file-path": str,
    },
    "identity": {"silent": bool},
    "nvinferserver": {"config-file-path": str, "batch-size": int},
    "fakesink": {"sync": bool, "async": bool},
}
MUX_KEYS = {
    *("algorithm-type", "adaptive-batching", "max-fps-control", "max-same-source-frames"),
    *(f"overall-{side}-fps-{part}" for side in ("min", "max") for part in "nd"),
}


def plugin_control() -> Any:
    """Build nvinferserver's message from the tables above."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="nvdsinferserver.proto", package="nvds", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, typed in fields:
            bare = typed.rstrip("*")
            label = kind.LABEL_REPEATED if typed.endswith("*") else kind.LABEL_OPTIONAL
            entry = message.field.add(name=field, number=number, label=label)
            if bare in ENUMS or bare in MESSAGES:
                entry.type_name = f".nvds.{bare}"
                entry.type = kind.TYPE_ENUM if bare in ENUMS else kind.TYPE_MESSAGE
            else:
                entry.type = kind.Type.Value(f"TYPE_{bare.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("nvds.PluginControl"))()


@pytest.fixture(scope="module")
def rendered() -> dict[Path, str]:
    config = configuration.load(LINE)
    return render(config, read_manifests(config), AT)


@pytest.mark.parametrize("product", ["fastener-tray", "cable-set"])
def test_nvinferserver_asks_for_the_ensemble_as_it_is(rendered: dict[Path, str], product: str) -> None:
    """The text parses; the input is UINT8 RGB in NHWC, not scaled and not shifted; tensors come out raw."""
    control = text_format.Parse(rendered[Path(product) / "nvinferserver.pbtxt"], plugin_control())
    manifest = json.loads((ROOT / "models_repo" / product / "manifest.json").read_text())
    backend, preprocess = control.infer_config.backend, control.infer_config.preprocess
    assert (backend.triton.model_name, backend.triton.version) == (product, manifest["version"])
    assert backend.triton.grpc.url == "127.0.0.1:18001"
    assert [(layer.name, layer.data_type) for layer in backend.inputs] == [("image", 6)]
    assert [layer.name for layer in backend.outputs] == ["score", "map_score", "mahalanobis", "anomaly_map"]
    assert (preprocess.network_format, preprocess.tensor_order, preprocess.tensor_name) == (1, 2, "image")
    assert (preprocess.normalize.scale_factor, list(preprocess.normalize.channel_offsets)) == (1.0, [])
    assert control.infer_config.HasField("postprocess")
    assert control.infer_config.postprocess.HasField("other")
    assert control.input_control.process_mode == 1
    assert control.output_control.output_tensor_meta
    assert control.infer_config.unique_id > 0


def test_the_schema_refuses_what_it_does_not_know() -> None:
    """A misspelt key or a value of another kind is a parse error: the tests above can fail."""
    for text in ("infer_config { max_batchsize: 8 }", 'infer_config { max_batch_size: "8" }', "input_control { x: 1 }"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(text, plugin_control())


def test_the_graph_is_a_chain_of_known_elements(rendered: dict[Path, str]) -> None:
    """Every property exists on its element with that type, edges join the nodes, and the files it names are there."""
    ports = []
    for name, text in rendered.items():
        if name.name != "pipeline.yaml":
            continue
        graph = yaml.safe_load(text)["deepstream"]
        names = [node["name"] for node in graph["nodes"]]
        assert graph["edges"] == dict(itertools.pairwise(names))
        for node in graph["nodes"]:
            for key, value in node["properties"].items():
                assert type(value) is PROPERTIES[node["type"]][key], (node["type"], key)
                if key == "config-file-path":
                    assert Path(value).relative_to(AT) in rendered
        ports.append(graph["nodes"][0]["properties"]["port"])
    assert len(set(ports)) == len(ports) == 2


def test_the_known_traps_are_avoided(rendered: dict[Path, str]) -> None:
    """No sink that holds the graph in PAUSED, no end with the last camera, REST on loopback only, no list at start."""
    for name, text in rendered.items():
        if name.name != "pipeline.yaml":
            continue
        nodes = {node["type"]: node["properties"] for node in yaml.safe_load(text)["deepstream"]["nodes"]}
        assert nodes["fakesink"]["async"] is False
        source = nodes["nvmultiurisrcbin"]
        assert source["drop-pipeline-eos"]
        assert source["live-source"]
        assert source["ip-address"] == "127.0.0.1"
        assert not source.keys() & {"uri-list", "width", "height", "batched-push-timeout"}


def test_the_mux_has_known_keys_and_a_deadline(rendered: dict[Path, str]) -> None:
    """The new mux's own keys, a minimum rate below the maximum, and no `batch-size`, which would undo the bin's."""
    for name, text in rendered.items():
        if name.name == "mux.txt":
            parser = configparser.ConfigParser()
            parser.read_string(text)
            assert parser.sections() == ["property"]
            values = {key: int(value) for key, value in parser["property"].items()}
            assert values.keys() == MUX_KEYS
            assert values["overall-min-fps-n"] <= values["overall-max-fps-n"]


def test_the_example_is_the_renderers(rendered: dict[Path, str]) -> None:
    r"""What lies in deploy/deepstream/example is what the renderer writes for deploy/deepstream/line.yaml, and no more.

    Anew: logicrd deepstream render deploy/deepstream/line.yaml --out deploy/deepstream/example \
    --root /opt/logicrd/deepstream
    """
    there = {path.relative_to(EXAMPLE): path.read_text() for path in EXAMPLE.rglob("*") if path.is_file()}
    assert there == rendered


def test_no_password_is_rendered_and_no_stranger(tmp_path: Path) -> None:
    """A camera's secret stays in its own file; one outside of the line's networks is refused, and so is a file that has
    no camera for a graph."""
    (tmp_path / "secret").write_text("s3cret")
    document = yaml.safe_load(LINE.read_text()) | {"triton": {"models_repo": str(ROOT / "models_repo")}}
    document["cameras"][0] |= {"user": "eve", "password_file": "secret"}

    def line(**keys: Any) -> configuration.LineConfig:
        (tmp_path / "line.yaml").write_text(yaml.safe_dump(document | keys))
        return configuration.load(tmp_path / "line.yaml")

    paths = write(line(), tmp_path / "out", AT)
    assert all("s3cret" not in path.read_text() for path in paths)
    with pytest.raises(ConfigError, match="camera_networks"):
        write(line(camera_networks=["192.0.2.0/24"]), tmp_path / "out", AT)
    bare = [{"id": "box", "type": "folder", "product": "cable-set", "path": "pictures"}]
    with pytest.raises(ConfigError, match="no camera"):
        write(line(cameras=bare), tmp_path / "out", AT)
    with pytest.raises(ConfigError, match="--out"):
        write(line(), tmp_path / "secret", AT)


def test_the_image_has_a_named_base_and_both_pythons() -> None:
    """No `latest`, the new mux switched on, the decoder's driver part asked for, and no root."""
    text = (ROOT / "deploy/deepstream/Dockerfile").read_text()
    bases = [line.partition("=")[2] for line in text.splitlines() if line.startswith("ARG ")]
    assert len(bases) == 2
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    for needed in ("USE_NEW_NVSTREAMMUX=yes", "compute,utility,video", "USER 10001", "--require-hashes"):
        assert needed in text

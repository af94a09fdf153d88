"""config.pbtxt of the three models, as messages of Triton's own protobuf classes.

Every tensor has the batch as its first dimension, which a config leaves out where `max_batch_size` is above 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samq.errors import MachineLacks

INSTALL = '`pip install "samq[triton]"`'

SAM = "sam"
PYTHON, TENSORRT = "python", "tensorrt_plan"
PLAN = "model.plan"
LONGEST_QUEUE = 256  # requests beyond it are refused at once, which bounds the server's memory
WARM_UP_SIZE = 1  # of dynamic sides

_TYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "string": "STRING",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Args:
        name: as in the engine.
        shape: sides, the batch first; a dynamic one has a name.
        dtype: numpy's name of it.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """An engine as a model of the server.

    Args:
        name: of the model.
        inputs, outputs: of the engine.
        max_batch_size: the largest batch, 0 where the engine's batch is fixed.
        gpu: it runs on GPUs.
        parameters: for its code.
        plans: compute capability ("9.0") → file of the TensorRT plan; empty for ONNX Runtime.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch_size: int
    gpu: bool
    parameters: Mapping[str, int]
    plans: Mapping[str, str]


@dataclass(frozen=True)
class Serving:
    """What an operator may tune.

    Args:
        store_mib: memory for the features of images that clients may click on again.
        concurrency: requests that `sam` answers side by side.
        max_batch: images that an engine with a dynamic batch takes at a time; a plan has a maximum of its own.
        max_image_pixels: H × W of an image.
        max_prompts: in a request.
        max_points: in a prompt, the two corners of a box included.
        max_mask_pixels: H × W × masks of an answer.
    """

    store_mib: int = 1024
    concurrency: int = 8
    max_batch: int = 4
    max_image_pixels: int = 50_000_000
    max_prompts: int = 64
    max_points: int = 64
    max_mask_pixels: int = 200_000_000

    def parameters(self) -> dict[str, int]:
        """What the code of `sam` reads from its config."""
        return {name: value for name, value in vars(self).items() if name not in ("concurrency", "max_batch")}


def part_config(part: Part) -> Any:
    """`ModelConfig` of the image encoder or the mask decoder."""
    pb = messages()
    config = pb.ModelConfig(name=part.name, max_batch_size=part.max_batch_size)
    if part.plans:
        config.platform = TENSORRT
        config.default_model_filename = PLAN
        config.cc_model_filenames.update(part.plans)
    else:
        config.backend = PYTHON
    batched = part.max_batch_size > 0
    config.input.extend(_input(tensor.name, tensor.dtype, _dims(tensor, batched)) for tensor in part.inputs)
    config.output.extend(_output(tensor.name, tensor.dtype, _dims(tensor, batched)) for tensor in part.outputs)
    if batched:
        _batch_dynamically(config)
    _common(config, gpu=part.gpu, parameters=part.parameters)
    warm_up = config.model_warmup.add(name="zeros", batch_size=1)
    for tensor in part.inputs:
        entry = warm_up.inputs[tensor.name]
        entry.data_type = _data_type(tensor.dtype)
        entry.dims.extend(WARM_UP_SIZE if side == -1 else side for side in _dims(tensor, batched))
        entry.zero_data = True
    return config


def sam_config(serving: Serving, mask_side: Sequence[int]) -> Any:
    """`ModelConfig` of `sam`. One instance, for its store of images belongs to one process.

    Args:
        mask_side: (h, w) of logits.
    """
    pb = messages()
    config = pb.ModelConfig(name=SAM, backend=PYTHON, max_batch_size=serving.concurrency)
    inputs = (
        ("image", "uint8", (-1, -1, 3)),
        ("handle", "string", (1,)),
        ("points", "float32", (-1, -1, 2)),
        ("labels", "int32", (-1, -1)),
        ("boxes", "float32", (-1, 4)),
        ("mask_input", "float32", (-1, *mask_side)),
        ("multimask", "bool", (1,)),
    )
    outputs = (
        ("masks", "bool", (-1, -1, -1, -1)),
        ("scores", "float32", (-1, -1)),
        ("object_scores", "float32", (-1,)),
        ("logits", "float32", (-1, -1, *mask_side)),
        ("handle", "string", (1,)),
    )
    config.input.extend(_input(*tensor, optional=True, allow_ragged_batch=True) for tensor in inputs)
    config.output.extend(_output(*tensor) for tensor in outputs)
    _batch_dynamically(config)
    _common(config, gpu=False, parameters=serving.parameters())
    return config


def as_text(config: Any) -> str:
    """A config as config.pbtxt."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def messages() -> Any:
    """The module of Triton's messages.

    Raises:
        MachineLacks: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError) as error:  # tritonclient turns the one into the other
        raise MachineLacks(f"tritonclient is not installed; run {INSTALL}") from error
    return model_config_pb2


def _common(config: Any, *, gpu: bool, parameters: Mapping[str, int]) -> None:
    pb = messages()
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.Kind.Value("KIND_GPU" if gpu else "KIND_CPU"))
    for name, value in parameters.items():
        config.parameters[name].string_value = str(value)


def _batch_dynamically(config: Any) -> None:
    """Without a delay: a batch is what came while the last one ran."""
    config.dynamic_batching.default_queue_policy.max_queue_size = LONGEST_QUEUE


def _dims(tensor: Tensor, batched: bool) -> list[int]:
    return [-1 if isinstance(side, str) else side for side in tensor.shape[1 if batched else 0 :]]


def _input(name: str, dtype: str, dims: Sequence[int], **options: bool) -> Any:
    return messages().ModelInput(name=name, data_type=_data_type(dtype), dims=dims, **options)


def _output(name: str, dtype: str, dims: Sequence[int]) -> Any:
    return messages().ModelOutput(name=name, data_type=_data_type(dtype), dims=dims)


def _data_type(dtype: str) -> Any:
    return messages().DataType.Value(f"TYPE_{_TYPES[dtype]}")

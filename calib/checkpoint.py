"""Loading a Segment Anything checkpoint: a local directory or a hub id, into a float model that is fit to quantize."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, Sam2Config, Sam2Model
from transformers.utils import logging as transformers_logging

from samq.calib.processor import SamProcessor
from samq.errors import BadInput, MachineLacks, UsageError
from samq.files import sha256_of

MODEL_TYPES = ("sam2", "sam2_video")  # the published SAM2 checkpoints call themselves sam2_video
SAFE_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DECISIVE = ("config.json", "preprocessor_config.json", "processor_config.json")
PATCH_STRIDE = 4  # of Hiera's finest feature map
STRIDE = 32  # of its coarsest

_PART_CONFIGS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Args:
        model: `Sam2Model`, float32, in eval mode, on the device asked for.
        processor: the preprocessing that it was trained with.
        directory: where its files are.
        fingerprint: hex digest of its configuration and weights.
    """

    model: Sam2Model
    processor: SamProcessor
    directory: Path
    fingerprint: str


def load_checkpoint(
    name_or_path: str, *, image_size: int | None = None, device: str = "cpu", allow_pickle: bool = False
) -> Checkpoint:
    """Load a SAM2 or SAM2.1 checkpoint of transformers' format.

    Args:
        name_or_path: local directory, or hub id such as "facebook/sam2.1-hiera-tiny".
        image_size: side of the square input in pixels; None for the checkpoint's own.
        device: "cpu" or "cuda".
        allow_pickle: accept a pickled checkpoint; it is then read with `weights_only=True`.

    Raises:
        BadInput: the checkpoint is missing, corrupt, incomplete, not finite, or of another model.
        MachineLacks: the hub cannot be reached, or there is no such device.
        UsageError: the image size does not suit the model.
    """
    directory = locate(name_or_path, allow_pickle)
    config: Any = _config(directory)
    if image_size is not None:
        _resize(config, image_size)
    model = _load(directory, config, allow_pickle)
    processor = SamProcessor.from_checkpoint(directory, config.prompt_encoder_config.image_size)
    return Checkpoint(_on_device(model, device), processor, directory, fingerprint_of(directory))


def locate(name_or_path: str, allow_pickle: bool = False) -> Path:
    """The directory of a checkpoint, downloaded from the hub when `name_or_path` is no local directory.

    Raises:
        BadInput: there is no such directory and no such hub id.
        MachineLacks: the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise BadInput(f"{path} is a file; give the directory that holds config.json and model.safetensors")
    if not _HUB_ID.fullmatch(name_or_path):
        raise BadInput(f"{name_or_path}: no such directory; give a checkpoint directory or a hub id (owner/name)")
    patterns = [*SAFE_FILES, *(PICKLES if allow_pickle else ())]
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=patterns, etag_timeout=5))
    except GatedRepoError as error:
        raise BadInput(f"{name_or_path} is gated; accept its licence on the hub and run `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(f"{name_or_path}: neither a directory here nor a model of the hub; check the name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MachineLacks(
            f"{name_or_path}: no such directory, the hub cannot be reached, and its cache has no such model;"
            " download it elsewhere and pass its local directory as --model-path"
        ) from error


def fingerprint_of(directory: Path) -> str:
    """Hex digest of the files that decide the model and its preprocessing."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and (path.suffix in (".safetensors", ".bin") or path.name in DECISIVE):
            digest.update(f"{path.name}:{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _config(directory: Path) -> Sam2Config:
    if not (directory / "config.json").is_file():
        raise BadInput(f"{directory}: config.json is missing; give a directory made by save_pretrained")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises classes of many libraries for a bad config
        raise BadInput(f"{directory / 'config.json'} is not a model's configuration ({_line(error)})") from error
    if config.model_type not in MODEL_TYPES:
        raise BadInput(f"{directory} holds a {config.model_type!r} model; samq takes SAM2 and SAM2.1 ('sam2')")
    if isinstance(config, Sam2Config):
        return config
    parts = {key: getattr(config, key).to_dict() for key in _PART_CONFIGS}
    return Sam2Config(**parts)


def _resize(config: Any, image_size: int) -> None:
    """Make the model take square images of another side."""
    window = config.vision_config.backbone_config.window_size_per_stage[0]
    step = math.lcm(STRIDE, PATCH_STRIDE * window)  # the position embedding repeats with the first stage's window
    if image_size < step or image_size % step:
        raise UsageError(f"--image-size {image_size}: this model takes multiples of {step}")
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    config.vision_config.backbone_feature_sizes = [[image_size // s] * 2 for s in (PATCH_STRIDE, 8, 16)]
    config.prompt_encoder_config.image_size = image_size


def _load(directory: Path, config: Sam2Config, allow_pickle: bool) -> Sam2Model:
    safe = any(directory.glob("*.safetensors"))
    if not safe and not allow_pickle:
        if any((directory / name).exists() for name in PICKLES):
            raise BadInput(f"{directory} holds a pickled checkpoint only; convert it to safetensors or --allow-pickle")
        raise BadInput(f"{directory}: model.safetensors is missing; give a directory made by save_pretrained")
    quiet = transformers_logging.get_verbosity()
    from_pretrained: Any = Sam2Model.from_pretrained  # its type knows nothing of output_loading_info
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, loading = from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=safe,
            weights_only=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are told by name below
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:  # torch's advice is to trust the file
        raise BadInput(
            f"{directory}: the pickled checkpoint holds more than tensors and is refused; "
            "convert it to safetensors where it can be trusted"
        ) from error
    except Exception as error:  # safetensors, torch, transformers and the OS each have their own
        raise BadInput(f"{directory}: the weights cannot be read ({_line(error)}); download them again") from error
    finally:
        transformers_logging.set_verbosity(quiet)
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    _check_complete(directory, loading)
    _check_finite(directory, model)
    model.train(False)
    loaded: Sam2Model = model
    return loaded


def _check_complete(directory: Path, loading: dict[str, Any]) -> None:
    mismatched = (key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])
    absent = sorted({*loading["missing_keys"], *mismatched})
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise BadInput(f"{directory}: {absent[0]}{more} missing or of a wrong shape; the checkpoint is incomplete")


def _check_finite(directory: Path, model: Sam2Model) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"{directory}: {name} holds NaN or infinity; the checkpoint is broken")


def _on_device(model: Sam2Model, device: str) -> Sam2Model:
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineLacks("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    model.to(device)  # type: ignore[arg-type] # transformers' decorator hides nn.Module's signature
    return model


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__

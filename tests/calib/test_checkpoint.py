"""Checkpoints: every kind that SAM2 comes in, and every way in which one is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import IMAGE_SIZE, small_config, small_sam2
from torch import Tensor
from transformers import Sam2VideoConfig, Sam2VideoModel

from samq.calib.checkpoint import fingerprint_of, load_checkpoint, locate
from samq.calib.parts import ImageEncoder, MaskDecoder
from samq.errors import BadInput, MachineLacks, UsageError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as `save_pretrained` writes it; not to be changed."""
    path = tmp_path_factory.mktemp("checkpoint")
    small_sam2().save_pretrained(path)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def _equal_weights(path: Path, **options: Any) -> None:
    found, expected = load_checkpoint(str(path), **options).model.state_dict(), small_sam2().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _changed(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(BadInput) as caught:
        load_checkpoint(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert all(word in message for word in words), message


def test_a_saved_model_comes_back(saved: Path) -> None:
    _equal_weights(saved)
    loaded = load_checkpoint(str(saved))
    assert not loaded.model.training
    assert loaded.directory == saved
    assert loaded.processor.image_size == IMAGE_SIZE
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_shards_come_back(tmp_path: Path) -> None:
    small_sam2().save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _equal_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    small_sam2().save_pretrained(tmp_path, max_shard_size="500KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    _refused(tmp_path)


def test_an_fp16_checkpoint_is_loaded_as_float32(tmp_path: Path) -> None:
    small_sam2().half().save_pretrained(tmp_path)
    found = load_checkpoint(str(tmp_path)).model.state_dict()
    for name, tensor in small_sam2().state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.half().to(tensor.dtype)), name


def test_a_video_checkpoint_gives_the_image_model_in_it(tmp_path: Path) -> None:
    """The published SAM2.1 checkpoints are of this kind."""
    config = small_config()
    small = {
        **dict.fromkeys(("memory_attention_hidden_size", "memory_attention_feed_forward_hidden_size"), 64),
        **dict.fromkeys(("memory_encoder_hidden_size", "mask_downsampler_embed_dim", "memory_fuser_embed_dim"), 64),
        **dict.fromkeys(("memory_attention_num_layers", "memory_fuser_num_layers"), 1),
        "memory_attention_rope_feat_sizes": [8, 8],
        "memory_encoder_output_channels": 16,
        "memory_fuser_intermediate_dim": 64,
    }
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    torch.manual_seed(1)
    video = Sam2VideoModel(
        Sam2VideoConfig(**{part: getattr(config, part).to_dict() for part in parts}, image_size=IMAGE_SIZE, **small)
    )
    with torch.no_grad():
        for parameter in video.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    video.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam2_video"
    loaded = load_checkpoint(str(tmp_path)).model
    expected = video.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert len(loaded.state_dict()) > 200
    assert loaded.config.mask_decoder_config.dynamic_multimask_stability_thresh == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [256, 64])
def test_another_image_size_keeps_the_weights_and_runs(saved: Path, size: int) -> None:
    _equal_weights(saved, image_size=size)
    loaded = load_checkpoint(str(saved), image_size=size)
    assert loaded.processor.image_size == size
    with torch.no_grad():
        features = ImageEncoder(loaded.model)(torch.zeros(1, 3, size, size))
        assert [feature.shape[-1] for feature in features] == [size // 16, size // 4, size // 8]
        mask = torch.zeros(1, 1, 1, size // 4, size // 4)
        point = torch.full((1, 1, 1, 2), size / 2), torch.ones(1, 1, 1, dtype=torch.int64)
        masks = MaskDecoder(loaded.model)(*features, *point, mask, torch.zeros(1, 1))[0]
    assert masks.shape == (1, 1, 4, size // 4, size // 4)


@pytest.mark.parametrize("size", [100, 33, 16, 0, -128])
def test_an_image_size_that_does_not_suit_is_refused(saved: Path, size: int) -> None:
    with pytest.raises(UsageError, match="multiples of 32"):
        load_checkpoint(str(saved), image_size=size)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "unusual.bin"])
def test_pickles_are_read_only_when_allowed(copied: Path, name: str) -> None:
    (copied / "model.safetensors").unlink()
    torch.save(small_sam2().state_dict(), copied / name)
    if name == "pytorch_model.bin":
        _refused(copied, "pickled", "--allow-pickle")
        _equal_weights(copied, allow_pickle=True)
    else:
        _refused(copied, "model.safetensors")


def test_a_pickle_that_runs_code_does_not_run(copied: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harmed",))

    (copied / "model.safetensors").unlink()
    torch.save({"weight": Harmful()}, copied / "pytorch_model.bin")
    _refused(copied, "more than tensors", allow_pickle=True)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copied: Path, value: float) -> None:
    name = "vision_encoder.backbone.blocks.1.mlp.proj_in.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 4] = value

    _changed(copied, damage)
    _refused(copied, name, "NaN or infinity")


def test_missing_weights_are_named(copied: Path) -> None:
    name = "mask_decoder.iou_token.weight"
    _changed(copied, lambda tensors: tensors.__delitem__(name))
    _refused(copied, name, "incomplete")


def test_weights_of_a_wrong_shape_are_refused(copied: Path) -> None:
    name = "mask_decoder.iou_token.weight"
    _changed(copied, lambda tensors: tensors.update({name: torch.zeros(1, 7)}))
    _refused(copied, name, "wrong shape")


@pytest.mark.parametrize("kept", [0, 4, 1000, -1000])
def test_a_truncated_file_is_refused(copied: Path, kept: int) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    _refused(copied, "cannot be read")


def test_a_git_lfs_pointer_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    _refused(copied, "cannot be read")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "no_such_model"}', "\x00"])
def test_a_broken_configuration_is_refused(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    _refused(copied, "config.json")


@pytest.mark.parametrize("model_type", ["sam", "bert"])
def test_another_model_is_refused_by_its_type(copied: Path, model_type: str) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": model_type}))
    _refused(copied, model_type, "SAM2")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    _refused(copied, name, "save_pretrained")


def test_a_file_instead_of_a_directory_is_told(saved: Path) -> None:
    _refused(saved / "model.safetensors", "is a file")


@pytest.mark.parametrize("name", ["no/such/directory", "nothing", "/no/such", "../no", "a b/c"])
def test_what_is_neither_directory_nor_hub_id_is_told(name: str) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        locate(name)


def test_without_network_a_hub_id_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MachineLacks, match="local directory as --model-path") as caught:
        locate("facebook/sam2.1-hiera-no-such")
    assert "\n" not in str(caught.value)


def test_the_fingerprint_tells_what_decides_the_model(copied: Path) -> None:
    first = fingerprint_of(copied)
    (copied / "README.md").write_text("words")
    assert fingerprint_of(copied) == first
    (copied / "preprocessor_config.json").write_text("{}")
    second = fingerprint_of(copied)
    _changed(copied, lambda tensors: tensors["no_memory_embedding"].add_(1))
    assert len({first, second, fingerprint_of(copied)}) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told(saved: Path) -> None:
    with pytest.raises(MachineLacks, match="--device cpu"):
        load_checkpoint(str(saved), device="cuda")

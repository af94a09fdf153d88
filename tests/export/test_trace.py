"""The float ONNX parts are the torch model: names, shapes and answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import STABILITY, as_written, float_model, float_part, float_predictor, largest_error, skeleton
from small_model import IMAGE_SIZE, pixels, small_sam2
from torch import Tensor

from samq.calib.parts import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    ENCODER_INPUTS,
    ENCODER_OUTPUTS,
    IMAGE_ENCODER,
    MASK_DECODER,
    PARTS,
    ImageEncoder,
    MaskDecoder,
)
from samq.engines.predictor import Predictor
from samq.export.trace import ANY_PROMPTS, OPSET, SITE_OP, StaticShape, set_parameters, trace

TOLERANCE = 1e-4
BATCHES_AND_PROMPTS = [(1, 1), (1, 5), (2, 1), (3, 2)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return float_predictor(tmp_path_factory.mktemp("fp32"))


def _compare(
    engines: Predictor,
    images: Tensor,
    coords: Tensor,
    labels: Tensor,
    masks: Tensor | None = None,
    **asked: Tensor | None,
) -> None:
    """Both parts together against `Sam2Model.forward`, called as `asked`."""
    features = engines.encoder.run({"pixel_values": images.numpy()})
    shape = coords.shape[:2]
    side = features["high_res_features_0"].shape[-2:]
    given = torch.zeros(*shape, 1, *side) if masks is None else masks[:, :, None]
    feeds = {
        "point_coords": coords.numpy(),
        "point_labels": labels.numpy(),
        "mask_input": given.numpy(),
        "has_mask_input": np.full(shape, float(masks is not None), np.float32),
    }
    answer = engines.decoder.run({**features, **feeds})
    for multimask, part in ((False, slice(0, 1)), (True, slice(1, None))):
        with torch.no_grad():
            expected = float_model()(pixel_values=images, multimask_output=multimask, **asked)
        assert largest_error(answer["masks"][:, :, part], expected.pred_masks.numpy()) <= TOLERANCE
        assert largest_error(answer["iou_scores"][:, :, part], expected.iou_scores.numpy()) <= TOLERANCE
        object_scores = expected.object_score_logits.numpy().reshape(*shape, 1)
        assert largest_error(answer["object_score_logits"], object_scores) <= TOLERANCE


def _places(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) * IMAGE_SIZE


def _corners(batch: int, prompts: int) -> Tensor:
    return _places(batch, prompts, 2, 2).sort(dim=2).values


@pytest.mark.parametrize("points", [1, 2, 7])
@pytest.mark.parametrize(("batch", "prompts"), BATCHES_AND_PROMPTS)
def test_clicks_are_answered_as_torch_does(engines: Predictor, batch: int, prompts: int, points: int) -> None:
    coords = _places(batch, prompts, points, 2)
    labels = (torch.arange(batch * prompts * points).reshape(batch, prompts, points) % 3 != 1).long()
    _compare(engines, pixels(batch), coords, labels, input_points=coords, input_labels=labels)


@pytest.mark.parametrize(("batch", "prompts"), BATCHES_AND_PROMPTS)
def test_boxes_are_answered_as_torch_does(engines: Predictor, batch: int, prompts: int) -> None:
    corners = _corners(batch, prompts)
    labels = torch.tensor([2, 3]).expand(batch, prompts, 2)
    _compare(engines, pixels(batch), corners, labels.contiguous(), input_boxes=corners.flatten(2))


def test_a_box_with_clicks_is_answered_as_torch_does(engines: Predictor) -> None:
    points, corners = _places(2, 3, 2, 2), _corners(2, 3)
    clicked = torch.tensor([1, 0]).expand(2, 3, 2).contiguous()
    coords = torch.cat([points, corners], dim=2)
    labels = torch.tensor([1, 0, 2, 3]).expand(2, 3, 4).contiguous()
    asked = {"input_points": points, "input_labels": clicked, "input_boxes": corners.flatten(2)}
    _compare(engines, pixels(2), coords, labels, **asked)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_a_mask_is_answered_as_torch_does(engines: Predictor, scale: float) -> None:
    coords, labels = _places(1, 1, 1, 2), torch.ones(1, 1, 1, dtype=torch.int64)
    side = float_model().prompt_encoder.mask_input_size
    mask = torch.randn(1, 1, *side, generator=torch.Generator().manual_seed(1)) * scale
    _compare(engines, pixels(1), coords, labels, mask, input_points=coords, input_labels=labels, input_masks=mask)


def test_padding_points_are_answered_as_torch_does(engines: Predictor) -> None:
    coords, labels = _places(1, 2, 3, 2), torch.tensor([[[1, 0, 1], [1, -10, -10]]])
    _compare(engines, pixels(1), coords, labels, input_points=coords, input_labels=labels)


def test_masks_count_only_where_they_are_given(engines: Predictor) -> None:
    features = engines.encode(pixels(1)[0].numpy())
    coords, labels = _places(2, 1, 2).numpy(), np.ones((2, 1), np.int64)
    mask = np.random.default_rng(0).standard_normal((2, *features["high_res_features_0"].shape[-2:]), np.float32)
    without, with_mask = engines.decode(features, coords, labels), engines.decode(features, coords, labels, mask)
    feeds = {"point_coords": coords[None], "point_labels": labels[None], "mask_input": mask[None, :, None]}
    mixed = engines.decoder.run({**features, **feeds, "has_mask_input": np.array([[0, 1]], np.float32)})["masks"][0]
    assert not np.allclose(without.masks, with_mask.masks)
    np.testing.assert_allclose(mixed[0], without.masks[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixed[1], with_mask.masks[1], rtol=1e-4, atol=1e-4)


def test_names_are_the_documented_ones_and_dimensions_dynamic(engines: Predictor) -> None:
    assert tuple(engines.encoder.inputs) == ENCODER_INPUTS
    assert tuple(engines.encoder.outputs) == ENCODER_OUTPUTS
    assert tuple(engines.decoder.inputs) == DECODER_INPUTS
    assert tuple(engines.decoder.outputs) == DECODER_OUTPUTS
    assert engines.encoder.shapes["pixel_values"] == ["batch", 3, IMAGE_SIZE, IMAGE_SIZE]
    assert engines.decoder.shapes["point_coords"] == ["batch", "prompts", "points", 2]
    assert engines.decoder.shapes["has_mask_input"] == ["batch", "prompts"]


@pytest.mark.parametrize("shapes", [StaticShape(), StaticShape(1, 8, None), ANY_PROMPTS], ids=str)
def test_each_side_is_fixed_or_has_a_name(shapes: StaticShape) -> None:
    batch, prompts, points = (getattr(shapes, side) or side for side in ("batch", "prompts", "points"))
    expected = {
        "point_coords": (batch, prompts, points, 2),
        "point_labels": (batch, prompts, points),
        "has_mask_input": (batch, prompts),
    }
    graph = trace(float_model(), MASK_DECODER, shapes).graph
    found = {
        value.name: tuple(s if isinstance(s, int) else s.value for s in value.shape or ()) for value in graph.inputs
    }
    assert {name: found[name] for name in expected} == expected
    assert {found[name][0] for name in ENCODER_OUTPUTS} == {1}


@pytest.mark.parametrize("part", PARTS)
def test_every_linear_layer_is_one_site(part: str) -> None:
    sites = [node.attributes["layer"].as_string() for node in skeleton(part).graph if node.op_type == SITE_OP]
    layers = [
        name
        for name, module in float_model().named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("vision_encoder.") == (part == IMAGE_ENCODER)
    ]
    assert sorted(sites) == sorted(layers)
    assert skeleton(part).graph.opset_imports[""] == OPSET


def test_the_tokens_behind_every_block_have_a_name() -> None:
    filled = float_part(skeleton(IMAGE_ENCODER), float_model(), half=False)
    names = {value.name for node in filled.graph for value in node.outputs}
    blocks = len(float_model().vision_encoder.backbone.blocks)
    assert {f"vision_encoder.backbone.blocks.{index}/tokens" for index in range(blocks)} <= names


@pytest.mark.parametrize("part", PARTS)
def test_initializers_are_called_like_the_parameters(part: str) -> None:
    state = float_model().state_dict()
    convolutions = [name for name, value in skeleton(part).graph.initializers.items() if len(value.shape or ()) == 4]
    assert convolutions
    assert not [name for name in convolutions if name.endswith("weight") and name not in state]


def test_a_trace_serves_a_model_with_other_weights() -> None:
    """What constant folding baked in would stay the first model's."""
    other = small_sam2(seed=7)
    filled = float_part(skeleton(IMAGE_ENCODER), other, half=False)
    answers = as_written(filled, {"pixel_values": pixels(2).numpy()})
    with torch.no_grad():
        expected = ImageEncoder(other)(pixels(2))
        first = ImageEncoder(float_model())(pixels(2))
    for found, exact, not_this in zip(answers, expected, first, strict=True):
        assert largest_error(found, exact.numpy()) <= TOLERANCE
        assert largest_error(found, not_this.numpy()) > 0.1


def test_a_decoder_trace_serves_a_model_with_other_weights() -> None:
    """Quantization changes every decoder weight but the position embedding, which the trace holds as a table."""
    other = small_sam2(seed=7)
    other.shared_image_embedding.load_state_dict(float_model().shared_image_embedding.state_dict())
    other.mask_decoder.dynamic_multimask_stability_thresh = STABILITY
    with torch.no_grad():
        features = ImageEncoder(other)(pixels(1))
        mask = torch.randn(1, 1, 1, *features[1].shape[-2:], generator=torch.Generator().manual_seed(0))
        given = (*features, _places(1, 1, 2, 2), torch.tensor([[[1, 0]]]), mask, torch.ones(1, 1))
        expected = MaskDecoder(other)(*given)
    feeds = {name: value.numpy() for name, value in zip(DECODER_INPUTS, given, strict=True)}
    answers = as_written(float_part(skeleton(MASK_DECODER), other, half=False), feeds)
    for found, exact in zip(answers, expected, strict=True):
        assert largest_error(found, exact.numpy()) <= TOLERANCE


def test_a_trace_refuses_parameters_of_another_shape() -> None:
    other = small_sam2()
    other.no_memory_embedding = torch.nn.Parameter(torch.zeros(1, 1, 3))
    with pytest.raises(RuntimeError, match="no_memory_embedding"):
        set_parameters(skeleton(IMAGE_ENCODER), other)


def test_the_skeleton_is_not_changed_by_filling_it() -> None:
    before = [node.name for node in skeleton(IMAGE_ENCODER).graph]
    float_part(skeleton(IMAGE_ENCODER), float_model(), half=True)
    assert [node.name for node in skeleton(IMAGE_ENCODER).graph] == before

"""One pass over images, for both parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from small_model import pixels
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.calibrate import GRID_PER_SIDE, calibrate, histograms
from samq.calib.parts import IMAGE_ENCODER, ImageEncoder, part_of
from samq.calib.statistics import InputStatistics
from samq.errors import BadInput


def linear_layers(model: Sam2Model, *, decoder: bool) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (decoder or part_of(name) == IMAGE_ENCODER)
    }


def gathered(model: Sam2Model, batches: list[Tensor], *, decoder: bool = True) -> dict[str, InputStatistics]:
    layers = linear_layers(model, decoder=decoder)
    return calibrate(model, layers, batches, with_hessian=True, with_decoder=decoder)


@pytest.mark.parametrize("decoder", [True, False])
def test_every_layer_is_seen(small_model: Sam2Model, decoder: bool) -> None:
    statistics = gathered(small_model, [pixels(1), pixels(2, 1)], decoder=decoder)
    assert statistics.keys() == linear_layers(small_model, decoder=decoder).keys()
    for name, entry in statistics.items():
        assert entry.rows > 0, name
        assert entry.hessian is not None
        assert entry.hessian.any(), name
        assert len(entry.sample) > 0
        assert (entry.low <= entry.high).all()


def test_encoder_statistics_are_those_of_a_plain_run(small_model: Sam2Model) -> None:
    name, seen = "vision_encoder.backbone.blocks.3.mlp.proj_out", []
    batches = [pixels(1), pixels(2, 1)]
    entry = gathered(small_model, batches)[name]
    handle = small_model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            ImageEncoder(small_model)(batch)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    assert entry.rows == len(rows)
    torch.testing.assert_close(entry.low, rows.amin(0))
    torch.testing.assert_close(entry.high, rows.amax(0))
    torch.testing.assert_close(entry.hessian, rows.T @ rows, rtol=1e-3, atol=1e-3)


def test_decoder_is_prompted_with_clicks_boxes_and_masks(small_model: Sam2Model) -> None:
    calls: list[tuple[list[int], Tensor]] = []
    model = copy.deepcopy(small_model)
    model.prompt_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((kwargs["input_labels"].unique().tolist(), kwargs["input_points"])),
        with_kwargs=True,
    )
    dense = []
    model.mask_decoder.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: dense.append(kwargs["image_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        embedding = ImageEncoder(model)(pixels(1))[0]
    gathered(model, [pixels(1)])
    assert [labels for labels, _ in calls] == [[1], [2, 3], [2, 3]]
    assert calls[0][1].shape == (GRID_PER_SIDE**2, 1, 1, 2)
    assert torch.equal(calls[1][1], calls[2][1])
    corners = calls[1][1][:, 0]
    assert (corners[:, 0] <= corners[:, 1]).all()
    assert 0 <= float(corners.min()) <= float(corners.max()) <= 128
    # without a mask every prompt of an image adds the same to its embedding, with one its own
    no_mask = [dense[call] - embedding for call in (0, 1)]
    for added in no_mask:
        torch.testing.assert_close(added, no_mask[0][:1].expand_as(added))
    assert len(dense[2]) > 1, "a mask of its own for each prompt"
    assert not torch.allclose(dense[2][0], dense[2][1])
    assert not torch.allclose(dense[2][:1], dense[0][:1])


def test_ticks_once_a_batch_and_reads_one_at_a_time(small_model: Sam2Model) -> None:
    events: list[str] = []

    def batches() -> Iterator[Tensor]:
        for index in range(3):
            events.append(f"read {index}")
            yield pixels(1, index)

    layers = linear_layers(small_model, decoder=False)
    calibrate(small_model, layers, batches(), False, False, lambda what: events.append(what))
    assert events == ["read 0", "calibrate", "read 1", "calibrate", "read 2", "calibrate"]


def test_a_batch_is_as_good_as_its_images(small_model: Sam2Model) -> None:
    together = gathered(small_model, [pixels(3)], decoder=False)
    apart = gathered(small_model, list(pixels(3).split(1)), decoder=False)
    for name in together:
        assert together[name].rows == apart[name].rows
        torch.testing.assert_close(together[name].hessian, apart[name].hessian, rtol=1e-3, atol=1e-2)


def test_histograms_alone_are_those_beside_other_statistics(small_model: Sam2Model) -> None:
    layers, batches = linear_layers(small_model, decoder=True), [pixels(1), pixels(2, 1)]
    alone = histograms(small_model, layers, iter(batches), with_decoder=True)
    beside = calibrate(small_model, layers, batches, False, True, with_histogram=True)
    assert alone.keys() == beside.keys() == layers.keys()
    for name, found in alone.items():
        histogram = beside[name].histogram
        assert histogram is not None
        assert torch.equal(found.counts, histogram.counts), name
        assert int(found.counts.sum()) == beside[name].rows * layers[name].in_features
        assert (found.low, found.high) == (float(beside[name].low.min()), float(beside[name].high.max()))


def test_no_image(small_model: Sam2Model) -> None:
    with pytest.raises(BadInput, match="no image"):
        gathered(small_model, [])
    with pytest.raises(BadInput, match="no image"):
        histograms(small_model, {}, [], with_decoder=False)


def test_histograms_of_values_that_are_not_finite(small_model: Sam2Model) -> None:
    broken = pixels(1)
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(BadInput, match="not finite"):
        histograms(small_model, linear_layers(small_model, decoder=False), [broken], with_decoder=False)


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_values_that_are_not_finite(small_model: Sam2Model, decoder: bool, value: float) -> None:
    broken = pixels(1)
    broken[0, 0, 0, 0] = value
    model = copy.deepcopy(small_model)
    if value == 1e30:  # LayerNorm's variance overflows; a large gain does what a large pixel cannot
        broken = pixels(1)
        with torch.no_grad():
            model.vision_encoder.backbone.blocks[0].layer_norm1.weight.fill_(1e30)
    with pytest.raises(BadInput, match="not finite") as caught:
        gathered(model, [broken], decoder=decoder)
    assert len(str(caught.value).splitlines()) == 1
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 0

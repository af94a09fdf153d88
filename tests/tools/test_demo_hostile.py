"""The hostile variant computes what the model does, and has what rounding to nearest fails on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import largest_error
from small_model import outputs, pixels
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.calibrate import calibrate, run_images
from samq.calib.checkpoint import load_checkpoint
from samq.calib.prompts import box_of, click_of
from samq.calib.statistics import InputStatistics
from samq.errors import UsageError
from samq.quant.config import load_recipe
from samq.quant.quantize import quantize
from samq.quant.signs import decoder_attentions, is_bimodal
from samq.quant.sites import FoldSite, fold_sites
from samq.tools.demo import hostile
from samq.tools.demo.dataset import CHECKPOINT
from samq.tools.demo.evaluate import evaluate
from samq.tools.demo.hostile import Draw, Outliers, Spread, make_hostile
from samq.tools.demo.model import pixel_values
from samq.tools.demo.scenes import Scene, draw_scene, held_out_scene

MOST = 1e-3  # of the largest value of an output
OUTLIERS = Outliers(torch.tensor([1, 5]), torch.tensor([100.0, 30.0]), torch.tensor([1.0, -1.0]))
NORM_OF_ATTENTION, NORM_OF_MLP, VALUES, RELU = "layer_norm1", "layer_norm2", "values", "ReLU"


def _errors(model: Sam2Model, other: Sam2Model) -> list[float]:
    """Of every output of both parts, on clicks, boxes and a mask."""
    pairs = zip(outputs(model), outputs(other), strict=True)
    return [largest_error(after.numpy(), before.numpy()) for before, after in pairs]


def _kind(site: FoldSite) -> str:
    if site.heads is not None:
        return VALUES
    return site.source.split(".")[-1] if "layer_norm" in site.source else RELU


def _inputs(model: Sam2Model) -> dict[str, InputStatistics]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return calibrate(model, layers, [pixels(2)], with_hessian=False, with_decoder=True)


@pytest.fixture(scope="module")
def variant(small_model: Sam2Model) -> Sam2Model:
    return make_hostile(small_model)


@pytest.fixture(scope="module")
def demo() -> Sam2Model:
    return load_checkpoint(str(CHECKPOINT)).model


@pytest.fixture(scope="module")
def hostile_demo(demo: Sam2Model) -> Sam2Model:
    return make_hostile(demo)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_output_stays(small_model: Sam2Model, seed: int) -> None:
    assert max(_errors(small_model, make_hostile(small_model, seed))) <= MOST


@pytest.mark.parametrize("kind", [NORM_OF_ATTENTION, NORM_OF_MLP, VALUES, RELU])
def test_scaling_is_exact_at_every_site(small_model: Sam2Model, kind: str) -> None:
    changed = copy.deepcopy(small_model)
    sites = [site for site in fold_sites(changed) if _kind(site) == kind]
    for site in sites:
        before = [layer.weight.clone() for layer in site.layers_in(changed)]
        hostile.scale_channels(changed, site, OUTLIERS)
        for layer, weight in zip(site.layers_in(changed), before, strict=True):
            torch.testing.assert_close(layer.weight[:, 1], weight[:, 1] / 100)
            assert torch.equal(layer.weight[:, 2], weight[:, 2])
    assert sites
    assert max(_errors(small_model, changed)) <= MOST


@pytest.mark.parametrize(
    ("kind", "allowed"), [(NORM_OF_MLP, True), (VALUES, True), (NORM_OF_ATTENTION, False), (RELU, False)]
)
def test_an_offset_is_exact_where_it_is_allowed_and_nowhere_else(
    small_model: Sam2Model, kind: str, allowed: bool
) -> None:
    changed = copy.deepcopy(small_model)
    for site in fold_sites(changed):
        if _kind(site) == kind:
            assert hostile.may_have_offset(changed, site) == allowed
            hostile.offset_channels(changed, site, OUTLIERS)
    assert (max(_errors(small_model, changed)) <= MOST) == allowed


def test_queries_and_keys_change_and_attention_does_not(small_model: Sam2Model) -> None:
    changed, spreads = copy.deepcopy(small_model), hostile.measure(small_model)
    for name, attention in decoder_attentions(changed).items():
        factors = torch.ones(attention.internal_dim)
        factors[OUTLIERS.channels] = OUTLIERS.factors
        hostile.offset_keys(attention, torch.ones(attention.internal_dim), spreads[f"{name}.k_proj"])
        hostile.exchange(attention, factors)
    assert max(_errors(small_model, changed)) <= MOST
    for before, after in zip(*(decoder_attentions(model).values() for model in (small_model, changed)), strict=True):
        torch.testing.assert_close(after.q_proj.weight[1], before.q_proj.weight[1] * 100)
        torch.testing.assert_close(after.k_proj.weight[5], before.k_proj.weight[5] / 30)
        assert not (after.k_proj.bias[2:5] == before.k_proj.bias[2:5]).any()


def test_keys_get_one_deviation_and_queries_about_one_besides_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    deviations = 2 ** torch.randn(2, 100, generator=generator)
    queries, keys = (Spread(torch.zeros(100), deviation, 4 * deviation) for deviation in deviations)
    factors = hostile.exchange_factors(queries, keys, Draw(100.0, generator))
    outliers = (deviations.prod(0)).topk(2).indices
    ordinary = torch.ones(100, dtype=torch.bool)
    ordinary[outliers] = False
    of_keys = (keys.deviation / factors)[ordinary]
    torch.testing.assert_close(of_keys, of_keys[:1].expand_as(of_keys))
    assert float((queries.deviation * factors).median()) == pytest.approx(1, rel=0.2)
    assert float((queries.largest * factors)[outliers].max()) == pytest.approx(170)


def test_a_query_that_is_larger_is_not_made_smaller() -> None:
    spread = Spread(torch.zeros(8), torch.ones(8), torch.full((8,), 1000.0))
    factors = hostile.exchange_factors(spread, spread, Draw(1.0, torch.Generator().manual_seed(0)))
    assert torch.equal(factors, torch.ones(8))


def test_what_never_changes_is_not_enlarged_without_end() -> None:
    statistics = InputStatistics.empty(3, with_hessian=False, device=torch.device("cpu"))
    statistics.add(torch.tensor([[1.0, 5.0, -2.0], [3.0, 5.0, -4.0]]))
    spread = Spread.of(statistics)
    torch.testing.assert_close(spread.mean, torch.tensor([2.0, 5.0, -3.0]))
    torch.testing.assert_close(spread.deviation, torch.tensor([2**0.5, 0.01 * 2**0.5, 2**0.5]))
    torch.testing.assert_close(spread.largest, torch.tensor([3.0, 5.0, 4.0]))


def test_few_channels_are_far_larger_than_the_rest(small_model: Sam2Model, variant: Sam2Model) -> None:
    before, after = _inputs(small_model), _inputs(variant)
    for site in fold_sites(variant):
        layer = site.layers[0]
        growth = after[layer].absmax() / before[layer].absmax().clamp(min=1e-6)
        assert int((growth > 1.01).sum()) <= max(1, 0.03 * len(growth)), layer
        if _kind(site) != RELU:  # whose most important channel may be one that never fires
            assert float(growth.max()) > 20, layer
            assert float(after[layer].absmax().max() / after[layer].absmax().median()) > 20, layer


def test_the_norms_of_a_stage_have_the_same_outliers(small_model: Sam2Model, variant: Sam2Model) -> None:
    found: dict[int, set[tuple[int, ...]]] = {}
    for site in fold_sites(variant):
        before, after = site.source_in(small_model), site.source_in(variant)
        if isinstance(after, nn.LayerNorm) and isinstance(before, nn.LayerNorm):
            channels = tuple((after.weight != before.weight).nonzero().flatten().tolist())
            found.setdefault(len(after.weight), set()).add(channels)
    assert all(len(channels) == 1 for channels in found.values())
    assert len(found) == 4


def _outputs_of(model: Sam2Model, run: Callable[[Sam2Model], object]) -> dict[str, Tensor]:
    """What the projections of the decoder's attentions put out, [tokens, N] each."""
    layers = hostile.projections(model)
    heard: dict[str, list[Tensor]] = {name: [] for name in layers}
    with torch.no_grad(), hostile.hearing(layers, {name: of.append for name, of in heard.items()}):
        run(model)
    assert not any(layer._forward_hooks for layer in layers.values())
    return {name: torch.cat([output.flatten(0, -2) for output in of]) for name, of in heard.items()}


def _ask(model: Sam2Model) -> None:
    """Boxes and clicks of a few held-out scenes, which are not those that were measured."""
    for index in range(4):
        images, prompts = _asked(held_out_scene(index))
        for prompt in prompts:
            model(pixel_values=images, **prompt)


def _calibrate(model: Sam2Model) -> None:
    """Noise, which is unlike the images that were measured, so that less is known of how far queries reach."""
    run_images(model, [pixels(2)], with_decoder=True)


@pytest.mark.parametrize(("model", "run", "least"), [("variant", _calibrate, 50), ("hostile_demo", _ask, 120)])
def test_all_keys_of_the_decoder_lie_in_two_clouds_and_all_queries_have_outliers(
    request: pytest.FixtureRequest, model: str, run: Callable[[Sam2Model], object], least: float
) -> None:
    changed = request.getfixturevalue(model)
    seen = _outputs_of(changed, run)
    assert len(seen) == 2 * 7
    for name in decoder_attentions(changed):
        queries, keys = seen[f"{name}.q_proj"].abs(), seen[f"{name}.k_proj"]
        assert least < float(queries.max()) < 260, name
        assert 0.2 < float(queries.median()) < 2, name
        positive = (keys > 0).float().mean(0)
        assert float(torch.maximum(positive, 1 - positive).min()) > 0.9, name
        assert 0.2 < float((positive > 0.5).float().mean()) < 0.8, name
        assert is_bimodal(keys), name


def test_the_demo_itself_has_neither(demo: Sam2Model) -> None:
    seen = _outputs_of(demo, _ask)
    assert not any(is_bimodal(keys) for name, keys in seen.items() if name.endswith("k_proj"))
    assert max(float(values.abs().max()) for values in seen.values()) < 120


def test_the_seed_decides(small_model: Sam2Model, variant: Sam2Model) -> None:
    same, other = make_hostile(small_model, 0).state_dict(), make_hostile(small_model, 1).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in variant.state_dict().items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in same.items())


@pytest.mark.parametrize("strength", [0.5, float("nan")])
def test_a_strength_below_one_is_refused(small_model: Sam2Model, strength: float) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        make_hostile(small_model, strength=strength)


def _asked(scene: Scene) -> tuple[Tensor, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Pixel values of a scene, and its boxes and its clicks as the model takes them."""
    box = {"input_boxes": torch.from_numpy(np.stack([box_of(mask) for mask in scene.masks]))[None]}
    click = {"input_points": torch.from_numpy(np.stack([click_of(mask) for mask in scene.masks]))[None, :, None]}
    return pixel_values(torch.from_numpy(scene.image)[None]), (box, click)


@torch.no_grad()
def test_the_demo_answers_boxes_clicks_and_masks_as_before(demo: Sam2Model, hostile_demo: Sam2Model) -> None:
    images, (box, click) = _asked(held_out_scene(3))
    masks = demo(pixel_values=images, **box, multimask_output=False).pred_masks[0, :1]
    for prompts in (box, click, {key: value[:, :1] for key, value in box.items()} | {"input_masks": masks}):
        before, after = (model(pixel_values=images, **prompts).pred_masks.numpy() for model in (demo, hostile_demo))
        assert largest_error(after, before) <= MOST


def test_rounding_to_nearest_fails_on_the_demo(hostile_demo: Sam2Model) -> None:
    calibration = [pixel_values(torch.from_numpy(draw_scene(10**6 + index).image)[None]) for index in range(4)]
    scenes = [held_out_scene(index) for index in range(8)]
    rounded = quantize(hostile_demo, load_recipe("int4_w4a8_rtn"), calibration).model
    before, after = (evaluate(model, scenes).box_miou for model in (hostile_demo, rounded))
    assert after < 0.9 * before


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hostile", *map(str, arguments)])
    return hostile.main()


def test_the_checkpoint_loads_like_any_other(
    small_model: Sam2Model, variant: Sam2Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model.save_pretrained(tmp_path / "original")
    assert _run(monkeypatch, tmp_path / "hostile", "--model-path", tmp_path / "original") == 0
    loaded = load_checkpoint(str(tmp_path / "hostile")).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in variant.state_dict().items())


def test_the_preprocessing_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(monkeypatch, tmp_path) == 0
    image = held_out_scene(0).image
    original, written = (load_checkpoint(str(path)).processor(image) for path in (CHECKPOINT, tmp_path))
    assert np.array_equal(original.pixel_values, written.pixel_values)


def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    cases: list[tuple[list[object], int, str]] = [
        ([tmp_path], 2, "not empty"),
        ([tmp_path / "new", "--strength", 0], 2, "1 or more"),
        ([tmp_path / "new", "--model-path", tmp_path / "none"], 6, "no such directory"),
        ([tmp_path / "file"], 5, "cannot be written"),
    ]
    for arguments, code, words in cases:
        assert _run(monkeypatch, *arguments) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert words in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"

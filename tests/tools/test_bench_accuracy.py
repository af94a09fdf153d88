"""The accuracy benchmark: its statistics, what its rows are, what it measures next, keeps and prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_model import pixels, small_sam2
from torch import nn
from transformers import Sam2Model

from samq.calib.checkpoint import Checkpoint, load_checkpoint
from samq.calib.parts import IMAGE_ENCODER
from samq.calib.sources import open_source
from samq.errors import BadInput, MachineLacks, UsageError
from samq.quant.config import LayerConfig, load_recipe, preset_names
from samq.quant.plan import LayerPlan, make_plan
from samq.quant.quantize import quantize
from samq.tools.bench_accuracy import bootstrap, llm_compressor_peer, method, modelopt_peer, ours, rows, session
from samq.tools.bench_accuracy.__main__ import main
from samq.tools.bench_accuracy.bootstrap import ratio
from samq.tools.bench_accuracy.method import BRANCH, FORMS, OURS, W4, W4A8, W8A8, Made, Method, Subject
from samq.tools.bench_accuracy.record import FP32, Record, read_record
from samq.tools.bench_accuracy.scenes import AGREEMENT, MEASURES, PackedMasks, Scene, masks_of, read_scenes, score
from samq.tools.bench_accuracy.session import Session, Settings, reason_of
from samq.tools.bench_accuracy.table import NONE, markdown
from samq.tools.demo.dataset import CHECKPOINT, HELD_OUT
from samq.tools.evaluate import BOX, CLICK, evaluate
from samq.tools.simulation import torch_predictor

RUN = {"command": "bench", "cores": 2}
DOCS = Path(__file__).parents[2] / "docs"
Plans = list[LayerPlan]


def _random(seed: int, scenes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sums of a float model's IoU of scenes, and a quantized model's, which is a little worse."""
    random = np.random.RandomState(seed)
    exact = random.uniform(2, 10, scenes)
    return exact, exact * (0.98 + 0.03 * random.standard_normal(scenes))


class TestBootstrap:
    def test_two_scenes_as_counted_by_hand(self) -> None:
        """Of the draws, a quarter is the first scene twice and a quarter the second: both ends of the interval."""
        estimate = ratio([1.0, 6.0], [2.0, 8.0])
        assert (estimate.value, estimate.low, estimate.high) == (0.7, 0.5, 0.75)

    def test_interval_of_a_sum_is_that_of_the_normal_distribution(self) -> None:
        exact, found = _random(0, 400)
        residuals = found - found.sum() / exact.sum() * exact
        error = np.sqrt(np.square(residuals).sum()) / exact.sum()  # of a ratio, linearized
        estimate = ratio(list(found), list(exact))
        assert estimate.value == pytest.approx(found.sum() / exact.sum(), rel=1e-12)
        assert estimate.low == pytest.approx(estimate.value - 1.96 * error, abs=0.1 * error)
        assert estimate.high == pytest.approx(estimate.value + 1.96 * error, abs=0.1 * error)

    def test_a_model_that_loses_the_same_everywhere_is_certain(self) -> None:
        exact, _ = _random(1, 50)
        estimate = ratio(list(0.9 * exact), list(exact))
        assert estimate.low == pytest.approx(0.9, abs=1e-12)
        assert estimate.high == pytest.approx(0.9, abs=1e-12)

    def test_differences_are_paired(self) -> None:
        exact, found = _random(2, 200)
        worse = found - 0.005 * exact
        estimate = ratio(list(found - worse), list(exact))
        assert estimate.low == pytest.approx(estimate.high, abs=1e-12)
        assert ratio(list(worse), list(exact)).high > ratio(list(found), list(exact)).low

    def test_scenes_are_the_unit(self) -> None:
        """The same prompts in fewer scenes say less."""
        exact, found = _random(3, 200)
        of_four = [list(values.reshape(50, 4).sum(1)) for values in (np.sort(found / exact) * 5, np.full(200, 5.0))]
        alone = ratio(list(np.sort(found / exact) * 5), [5.0] * 200)
        together = ratio(*of_four)
        assert together.value == pytest.approx(alone.value)
        assert together.high - together.low > 1.5 * (alone.high - alone.low)

    def test_the_same_draws_for_all(self) -> None:
        exact, found = _random(4, 30)
        once = ratio(list(found), list(exact))
        bootstrap._draws.cache_clear()
        assert ratio(list(found), list(exact)) == once

    def test_scenes_without_prompts_do_not_spoil_it(self) -> None:
        estimate = ratio([0.0, 0.9, 0.8], [0.0, 1.0, 1.0])
        assert estimate.value == pytest.approx(0.85)
        assert (estimate.low, estimate.high) == (0.8, 0.9)

    @pytest.mark.parametrize(("above", "below"), [([1.0], [1.0, 2.0]), ([1.0], [0.0])])
    def test_nonsense_is_an_error(self, above: Sequence[float], below: Sequence[float]) -> None:
        with pytest.raises(ValueError, match="denominators"):
            ratio(above, below)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return load_checkpoint(str(CHECKPOINT))


@pytest.fixture(scope="module")
def scenes(demo: Checkpoint) -> list[Scene]:
    return read_scenes(open_source(HELD_OUT), demo.processor, 2)


class TestScenes:
    def test_scores_are_those_of_evaluate(self, demo: Checkpoint, scenes: list[Scene]) -> None:
        baseline = torch_predictor(demo.model)
        quantized = torch_predictor(quantize(demo.model, load_recipe("int4_w4only_rtn"), None).model)
        expected, found = ([masks_of(model, scene) for scene in scenes] for model in (baseline, quantized))
        sums = score(found, PackedMasks(expected), scenes)
        source = open_source(HELD_OUT)
        for index in range(2):
            records = evaluate(baseline, quantized, [source[index]], demo.processor)
            for kind in (BOX, CLICK):
                ious = [record.iou_quantized for record in records if record.kind == kind]
                assert sums[kind][index] == pytest.approx(sum(value or 0 for value in ious), abs=1e-9)
            agreement = sum(record.agreement for record in records)
            assert sums[AGREEMENT][index] == pytest.approx(agreement, abs=1e-9)
            assert agreement < len(records)

    def test_masks_are_packed_without_loss(self) -> None:
        random = np.random.RandomState(0)
        masks = [{BOX: random.rand(count, 5, 7) > 0.5, CLICK: random.rand(count, 5, 7) > 0.5} for count in (3, 0, 1)]
        for before, after in zip(masks, PackedMasks(masks), strict=True):
            assert all(np.array_equal(before[kind], after[kind]) for kind in (BOX, CLICK))

    def test_a_scene_without_objects_counts_nothing(self, demo: Checkpoint, scenes: list[Scene]) -> None:
        empty = replace(scenes[0], truths=scenes[0].truths[:0])
        answers = [masks_of(torch_predictor(demo.model), empty)]
        assert score(answers, answers, [empty]) == {measure: [0.0] for measure in MEASURES}


class TestRows:
    def test_every_row_has_a_rival_of_ours_and_of_its_form(self) -> None:
        for row in rows.METHODS.values():
            rival = rows.METHODS[row.rival]
            assert rival.who == OURS
            assert rival.form == row.form
            assert row.form in FORMS
        assert all(rows.METHODS[key].rival == key for key in method.OUR_ROW.values())

    def test_a_row_that_takes_other_inputs_than_its_rival_says_so(self) -> None:
        unlike = {key for key, row in rows.METHODS.items() if row.inputs != rows.METHODS[row.rival].inputs}
        assert unlike == {
            "w4a8-token",
            "modelopt-svdquant-nvfp4",
            "llmcompressor-w8a8",
            "llmcompressor-w8a8-smooth",
        }

    def test_all_rows_are_measured_once_and_the_main_ones_first(self) -> None:
        order = [row.key for row in rows.rows(None, [])]
        assert sorted(order) == sorted(rows.METHODS)
        assert tuple(order[: len(rows.FIRST)]) == rows.FIRST
        assert {row.who for row in rows.METHODS.values()} == {OURS, *rows.MODULES}

    @pytest.mark.parametrize("preset", preset_names())
    def test_every_preset_is_a_row(self, preset: str) -> None:
        recipe = load_recipe(preset)
        forms = {"int4_w4a8": W4A8, "int4_w4only": W4, "int4_svdquant": BRANCH, "int8_w8a8": W8A8}
        (row,) = (row for row in ours.METHODS if row.recipe == recipe.to_yaml())
        assert row.form == forms[preset.removesuffix("_rtn").removesuffix("_sym")]

    def test_rows_differ_from_presets_as_their_titles_say(self) -> None:
        plain = ours.with_changes("int4_w4a8", ours.PLAIN)
        assert plain.wgts == load_recipe("int4_w4a8").wgts
        assert not plain.shift.enabled
        assert not plain.smooth.enabled
        assert len({row.recipe for row in ours.METHODS}) == len(ours.METHODS)

    def test_each_form_has_rows_for_what_its_methods_gain(self) -> None:
        """Round to nearest, GPTQ alone, smoothing alone (the W8A8 preset is that itself), all of it with rotation."""
        recipes = {row.key: yaml.safe_load(row.recipe) for row in ours.METHODS}
        parts = {
            key: (bool(of["wgts"]["kernel_gptq"]), of["shift"]["enabled"], of["smooth"]["enabled"])
            for key, of in recipes.items()
        }
        rotated = {key for key, of in recipes.items() if of["rotation"]["enabled"]}
        for form, smooth in (("w4a8", "w4a8-smooth"), ("w4only", "w4only-smooth"), ("w8a8", "w8a8")):
            assert parts[f"{form}-rtn"] == (False, False, False)
            assert parts[f"{form}-gptq"] == (True, False, False)
            assert parts[smooth] == (False, True, True)
            assert parts[f"{form}-rotation"] == parts[form]
        assert parts["w8a8-smooth-gptq"] == (True, True, True)
        assert rotated == {"w4a8-rotation", "w4a8-rotation-alone", "w4only-rotation", "w8a8-rotation"}

    def test_a_config_gets_a_row(self, tmp_path: Path) -> None:
        (tmp_path / "best.yaml").write_text(load_recipe("int4_svdquant").to_yaml(), encoding="utf-8")
        (row,) = rows.rows([], [str(tmp_path / "best.yaml")])
        assert (row.key, row.form, row.rival, row.inputs) == ("config:best", BRANCH, "svdquant", "static, per tensor")

    def test_configs_that_the_table_cannot_hold(self, tmp_path: Path) -> None:
        recipe = load_recipe("int4_w4only").to_yaml()
        for folder, text in (("a", recipe), ("b", recipe), ("c", recipe.replace("uint4", "uint8"))):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "best.yaml").write_text(text, encoding="utf-8")
        paths = [str(tmp_path / folder / "best.yaml") for folder in "abc"]
        with pytest.raises(UsageError, match="one name"):
            rows.rows([], paths[:2])
        with pytest.raises(UsageError, match="no place in the table"):
            rows.rows([], paths[2:])

    def test_bits_are_what_the_plan_counts(self, small_model: Sam2Model) -> None:
        subject = Subject("small", small_model, [])
        made = ours.method_of("x", "x", load_recipe("int4_w4only_rtn")).make(subject)
        plans = [plan for plan in make_plan(small_model, load_recipe("int4_w4only_rtn")) if plan.skip is None]
        weights = sum(plan.in_features * plan.out_features for plan in plans)
        assert made.bits == pytest.approx(8 * sum(plan.planned_bytes for plan in plans) / weights, rel=1e-3)
        assert 4 < made.bits < 5

    def test_bits_count_layers_that_a_config_leaves_float(self, small_model: Sam2Model) -> None:
        """Else a mix with float layers would look smaller than it is; what presets leave float never counts."""
        usual = load_recipe("int4_w4only_rtn")
        first, *others = method.layers_to_quantize(small_model)
        mixed = usual.model_copy(update={"layers": {first.name: LayerConfig(dtype="float")}})
        one, other = (ours.method_of("x", "x", recipe) for recipe in (usual, mixed))
        subject = Subject("small", small_model, [])
        weights = [plan.in_features * plan.out_features for plan in (first, *others)]
        own = sum(plan.planned_bytes for plan in make_plan(small_model, usual) if plan.name == first.name)
        gained = 8 * (first.fp16_bytes - own) / sum(weights)
        assert other.make(subject).bits - one.make(subject).bits == pytest.approx(gained, rel=1e-2)

    def test_a_digest_depends_on_code_recipe_and_version(self) -> None:
        digests = [rows.code_digest(None, None), *(rows.code_digest(row, None) for row in ours.METHODS)]
        peer = rows.METHODS["modelopt-w4a8-awq"]
        digests += [rows.code_digest(peer, "1"), rows.code_digest(peer, "2")]
        assert len(set(digests)) == len(digests)


@pytest.fixture(scope="module")
def plans() -> Plans:
    return method.layers_to_quantize(small_sam2())


class TestPeers:
    def test_layers_are_those_of_samqs_presets(self, small_model: Sam2Model, plans: Plans) -> None:
        assert {plan.part for plan in plans} == {IMAGE_ENCODER}
        for preset in preset_names():
            own = make_plan(small_model, load_recipe(preset))
            assert [plan.name for plan in own if plan.skip is None] == [plan.name for plan in plans]

    def test_groups_divide_the_inputs(self, plans: Plans) -> None:
        assert {plan.in_features for plan in plans} >= {32, 96, 128}
        for form, asked in method.GROUPS.items():
            for plan in plans:
                size = method.group_of(plan, form)
                assert plan.in_features % size == 0
                assert size <= max(asked, plan.in_features)

    def test_rank_takes_the_share_of_bytes_and_no_more(self, plans: Plans) -> None:
        weights = sum(plan.in_features * plan.out_features for plan in plans)
        sides = sum(plan.in_features + plan.out_features for plan in plans)
        rank = method.rank_within(plans, 0.2)
        assert rank * sides <= 0.2 * weights < (rank + 1) * sides

    def test_modelopt_is_asked_for_these_layers_alone(self, plans: Plans) -> None:
        shipped = {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": None}
        first, *formats = modelopt_peer._formats(plans, modelopt_peer.Setup("x"), shipped)
        assert first == {"quantizer_name": "*", "enable": False}
        assert formats == [
            {"quantizer_name": f"{plan.name}.weight_quantizer", "cfg": shipped["*weight_quantizer"]} for plan in plans
        ]
        setup = modelopt_peer.Setup("x", W4A8, int8_inputs=True)
        _, *formats = modelopt_peer._formats(plans, setup, shipped)
        assert len(formats) == 2 * len(plans)
        assert formats[1]["cfg"] == modelopt_peer.INT8
        sizes = [entry["cfg"]["block_sizes"][-1] for entry in formats[::2]]
        assert sizes == [method.group_of(plan, W4A8) for plan in plans]

    def test_llm_compressor_gets_each_layer_once(self, plans: Plans) -> None:
        setup = llm_compressor_peer.Setup(llm_compressor_peer.FLOAT, W4, symmetric=False)
        groups = llm_compressor_peer._config_groups(plans, W4, setup)
        named = {name: of["weights"]["group_size"] for of in groups.values() for name in of["targets"]}
        assert named == {plan.name: method.group_of(plan, W4) for plan in plans}
        assert sum(len(of["targets"]) for of in groups.values()) == len(plans)
        assert all(not of["weights"]["symmetric"] and of["input_activations"] is None for of in groups.values())

    def test_llm_compressor_smooths_behind_norms(self, small_model: Sam2Model, plans: Plans) -> None:
        mappings = llm_compressor_peer._mappings(small_model)
        smoothed = {layer for layers, _ in mappings for layer in layers}
        assert all(isinstance(small_model.get_submodule(source), nn.LayerNorm) for _, source in mappings)
        assert {plan.name for plan in plans if plan.name.endswith(("attn.qkv", "mlp.proj_in"))} <= smoothed

    @pytest.mark.parametrize("key", ["modelopt-w4a8-awq", "modelopt-w8a8-smooth", "modelopt-svdquant-bytes"])
    def test_modelopt_quantizes_them(self, key: str, saved_model: Sam2Model) -> None:
        pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed (extra bench)")
        _check_peer(key, saved_model)

    @pytest.mark.parametrize("key", ["llmcompressor-w4a8-smooth", "llmcompressor-w4-asym", "llmcompressor-w8a8"])
    def test_llm_compressor_quantizes_them(self, key: str, saved_model: Sam2Model) -> None:
        pytest.importorskip("llmcompressor", reason="llmcompressor is not installed (extra bench)")
        _check_peer(key, saved_model)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Sam2Model:
    """The small model, loaded from a checkpoint, to which llm-compressor looks back."""
    folder = tmp_path_factory.mktemp("checkpoint")
    small_sam2().save_pretrained(folder)
    return load_checkpoint(str(folder)).model


def _check_peer(key: str, model: Sam2Model) -> None:
    """It changes what its layers put out, a little, and nothing else; the model that it is given stays as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    row = rows.METHODS[key]
    made = row.make(Subject("small", model, list(pixels(2).split(1))))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert row.form == W8A8 or 4 < made.bits < 6
    assert row.form != W8A8 or 8 < made.bits < 9
    chosen = {plan.name for plan in method.layers_to_quantize(model)}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            width = layer.in_features
            x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
            exact, found = layer(x), made.model.get_submodule(name)(x)
            same = torch.equal(exact, found)
            assert same != (name in chosen), name


def _row(figures: dict[str, Any] | None = None, **measures: list[float]) -> dict[str, Any]:
    return {"code": "c", "scenes": 2, "seconds": 1.0, **(figures or {}), **measures}


class TestRecord:
    def test_what_is_due(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "new" / "accuracy.json", RUN)
        assert record.is_due("demo", "w4a8", "c", 2)
        record.put("demo", "w4a8", _row())
        again = Record(record.path, RUN)
        assert not again.is_due("demo", "w4a8", "c", 2)
        assert again.is_due("hostile", "w4a8", "c", 2)
        assert again.is_due("demo", "w4a8", "other", 2)
        assert again.is_due("demo", "w4a8", "c", 3)
        record.put("demo", "peer", _row({"reason": "not installed", "lacks": True}))
        record.put("demo", "other", _row({"reason": "refuses"}))
        assert again.is_due("demo", "peer", "c", 2)
        assert not again.is_due("demo", "other", "c", 2)

    def test_two_processes_lose_nothing_of_each_other(self, tmp_path: Path) -> None:
        one, two = (Record(tmp_path / "accuracy.json", RUN | {"command": name}) for name in ("one", "two"))
        one.put("demo", "a", _row())
        two.put("hostile", "a", _row())
        one.put("demo", "b", _row())
        content = read_record(one.path)
        assert {key: content["runs"][row["run"]]["command"] for key, row in content["rows"].items()} == {
            "demo/a": "one",
            "hostile/a": "two",
            "demo/b": "one",
        }
        assert list(tmp_path.iterdir()) == [one.path]

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [], "rows": {"demo/a": {"run": 0}}}'])
    def test_another_file_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "accuracy.json").write_text(text, encoding="utf-8")
        with pytest.raises(BadInput, match="no record of bench_accuracy"):
            Record(tmp_path / "accuracy.json", RUN)

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(MachineLacks, match="name another --json"):
            Record(tmp_path / "file" / "accuracy.json", RUN).put("demo", "a", _row())


class Counted:
    """A method's `make` that counts its calls."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self._error = 0, error

    def __call__(self, subject: Subject) -> Made:
        """The float model with its first layer spoiled."""
        self.calls += 1
        if self._error is not None:
            raise self._error
        return Made(quantize(subject.model, load_recipe("int4_w4only_rtn"), None).model, 4.5, "a note")


SETTINGS = Settings(scenes=2, calibration=1, photos=None, redo=False)


class TestSession:
    def test_rows_are_measured_once(self, tmp_path: Path) -> None:
        record, make = Record(tmp_path / "accuracy.json", RUN), Counted()
        row = Method("x", "X", W4, OURS, make)
        for _ in range(2):
            Session(record, SETTINGS).measure(["demo"], [row])
        assert make.calls == 1
        Session(record, replace(SETTINGS, redo=True)).measure(["demo"], [row])
        Session(record, replace(SETTINGS, calibration=2)).measure(["demo"], [row])
        Session(record, replace(SETTINGS, calibration=2, scenes=1)).measure(["demo"], [row])
        assert make.calls == 4
        exact, figures = (record.figures("demo", key) or {} for key in (FP32, "x"))
        assert (figures["bits"], figures["note"], len(figures[BOX])) == (4.5, "a note", 1)
        assert figures[AGREEMENT][0] < exact[AGREEMENT][0] == int(exact[AGREEMENT][0])

    def test_a_peer_that_fails_is_an_entry(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(rows.MODULES, "numpy", rows.MODULES[modelopt_peer.PACKAGE])
        record, make = Record(tmp_path / "accuracy.json", RUN), Counted(AssertionError("needs\n  a GPU"))
        for _ in range(2):
            Session(record, SETTINGS).measure(["demo"], [Method("x", "X", W4, "numpy", make)])
        figures = record.figures("demo", "x") or {}
        assert (figures["reason"], figures["version"]) == ("AssertionError: needs a GPU", np.__version__)
        assert make.calls == 1

    def test_a_peer_that_is_not_there_is_an_entry(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(rows.MODULES, "no-such-package", rows.MODULES[modelopt_peer.PACKAGE])
        record, make = Record(tmp_path / "accuracy.json", RUN), Counted()
        Session(record, SETTINGS).measure(["demo"], [Method("x", "X", W4, "no-such-package", make)])
        figures = record.figures("demo", "x") or {}
        assert "no-such-package is not installed" in figures["reason"]
        assert record.is_due("demo", "x", figures["code"], 2)
        assert make.calls == 0

    def test_a_failure_of_ours_is_none_of_these(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "accuracy.json", RUN)
        with pytest.raises(ZeroDivisionError):
            Session(record, SETTINGS).measure(
                ["demo"], [Method("x", "X", W4, OURS, Counted(ZeroDivisionError("a bug")))]
            )

    def test_photos_are_added_to_rows_without(self, tmp_path: Path) -> None:
        from PIL import Image

        (tmp_path / "photos").mkdir()
        random = np.random.RandomState(0)
        coarse = Image.fromarray(random.randint(0, 255, (9, 12, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(tmp_path / "photos" / "a.png")
        record, make = Record(tmp_path / "accuracy.json", RUN), Counted()
        asked = replace(SETTINGS, photos=tmp_path / "photos")
        for settings in (SETTINGS, asked, asked, SETTINGS):
            Session(record, settings).measure(["demo"], [Method("x", "X", W4, OURS, make)])
        assert make.calls == 2
        assert 0.5 < (record.figures("demo", "x") or {})["photos"] < 1

    def test_a_long_message_is_cut(self) -> None:
        assert reason_of(ValueError()) == "ValueError"
        told = reason_of(ValueError("word " * 100))
        assert len(told) == session.LONGEST_REASON
        assert told.endswith("…")


ROWS = (
    Method("svdquant", "Ours", BRANCH, OURS, Counted()),
    Method("peer", "Theirs", BRANCH, "peer", Counted()),
    Method("mute", "Silent", BRANCH, "peer", Counted()),
    Method("w4only", "Weights", W4, OURS, Counted()),
)


def _content() -> dict[str, Any]:
    measured = {"run": 0, "bits": 4.5, "note": "rank 3"}
    return {
        "runs": [RUN],
        "rows": {
            "demo/fp32": _row({"run": 0}, box=[2.0, 8.0], click=[2.0, 2.0], agreement=[4.0, 12.0]),
            "demo/svdquant": _row(measured, box=[2.0, 7.0], click=[2.0, 2.0], agreement=[4.0, 11.0]),
            "demo/peer": _row(measured, box=[1.0, 6.0], click=[1.0, 1.0], agreement=[3.0, 10.0]),
            "demo/mute": _row({"run": 0, "reason": "Error: a | b"}),
            "demo/w4only": _row(measured | {"scenes": 1}, box=[1.0], click=[1.0], agreement=[2.0]),
        },
    }


class TestTable:
    def test_rows_side_by_side(self) -> None:
        lines = markdown(_content(), ROWS).splitlines()
        cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines if line[:1] == "|"}
        assert cells["**Ours** (rank 3)"][2:5] == [
            "4.50",
            "0.9000 [0.8750, 1.0000]",
            "1.0000 [1.0000, 1.0000]",
        ]
        assert cells["**Ours** (rank 3)"][6:] == [NONE] * 3
        assert cells["Theirs (rank 3)"][6:8] == ["+0.2000 [+0.1250, +0.5000]", "+0.5000 [+0.5000, +0.5000]"]
        assert cells["Silent"][3] == "refuses: Error: a \\| b"
        assert {len(row) for row in cells.values()} == {9}
        assert "### demo, 2 scenes" in lines
        assert "Weights" not in markdown(_content(), ROWS)
        assert lines[-1] == "1. `bench`: cores 2"

    def test_photos_get_a_column_where_there_are_some(self) -> None:
        content = _content()
        content["rows"]["demo/peer"]["photos"] = 0.875
        lines = [line for line in markdown(content, ROWS).splitlines() if line[:1] == "|"]
        assert [line.strip("| ").split(" | ")[-1] for line in lines] == ["photos", "---", NONE, "0.8750", NONE]

    def test_without_a_float_model_there_is_nothing_to_compare(self) -> None:
        content = _content()
        del content["rows"]["demo/fp32"]
        assert "###" not in markdown(content, ROWS)


class TestCommand:
    def test_prints_a_record(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "accuracy.json"
        path.write_text(json.dumps(_content()), encoding="utf-8")
        assert main(["--json", str(path), "--table"]) == 0
        assert "`int4_svdquant`" in capsys.readouterr().out

    def test_the_document_is_the_record(self) -> None:
        content = read_record(DOCS / "accuracy.json")
        shown = markdown(content, rows.rows(None, []))
        assert (DOCS / "accuracy-run.md").read_text(encoding="utf-8") == shown

    def test_measures_what_is_asked_for(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "accuracy.json"
        asked = ["--models", "demo", "hostile", "--methods", "w4only-rtn", "--scenes", "1", "--calibration", "1"]
        assert main(["--json", str(path), *asked]) == 0
        out = capsys.readouterr().out
        assert "### demo, 1 scenes" in out
        assert "### hostile, 1 scenes" in out
        content = read_record(path)
        assert set(content["rows"]) == {f"{m}/{key}" for m in ("demo", "hostile") for key in (FP32, "w4only-rtn")}
        assert "--scenes 1 --calibration 1" in content["runs"][0]["command"]

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (["--table"], 6, "measure first"),
            (["--config", "no-such"], 2, "no preset or file"),
        ],
    )
    def test_refusals(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
    ) -> None:
        assert main(["--json", str(tmp_path / "none.json"), *arguments]) == code
        told = capsys.readouterr().err
        assert told.startswith("bench_accuracy: ")
        assert words in told
        assert len(told.splitlines()) == 1

    @pytest.mark.parametrize("scenes", ["0", "501", "x"])
    def test_scenes_that_there_are_not(self, scenes: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["--scenes", scenes])
        assert ended.value.code == 2

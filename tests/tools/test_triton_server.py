"""The real Triton server on a repository of the demo model: its masks, its store, what it refuses, and load on it."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import refused, samq
from numpy.typing import NDArray
from PIL import Image
from triton_plans import MODELS, MOST, with_plans
from triton_server import Server, server_folder, serving

from samq.calib.parts import PARTS
from samq.calib.processor import SamProcessor
from samq.calib.prompts import box_of, boxes, click_of, clicks
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.predictor import MULTI, Predictor
from samq.errors import BadInput, MachineLacks
from samq.tools.client import Protocol, SamClient
from samq.tools.demo.dataset import CHECKPOINT, HeldOutScenes
from samq.tools.metrics import mask_of

ADMINISTRATION = "shared-memory,model-repository,model-config,trace,logging:admin=secret"
LOCKED = (f"--http-restricted-api={ADMINISTRATION}", f"--grpc-restricted-protocol={ADMINISTRATION}")
GRPC_HEADER = "triton-grpc-protocol-admin"
COUNTING_TIMEOUT = 30.0  # seconds
STORE_MIB = 4
IMAGES_KEPT = 8  # of half a mebibyte each
CLIENTS, IMAGES_EACH, LEAST_ROUNDS, MOST_ROUNDS = 4, 3, 2, 8
LEAK = CLIENTS * IMAGES_EACH * 2**18  # bytes: half of the features that a round computes
Bad = tuple[str, dict[str, NDArray[Any]], str]


@dataclass(frozen=True)
class Scene:
    """A picture, and what the engine makes of it in this process."""

    image: NDArray[np.uint8]
    box: NDArray[np.float32]
    click: NDArray[np.float32]
    box_mask: NDArray[np.bool_]
    click_masks: NDArray[np.bool_]
    scores: tuple[float, NDArray[np.float32]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's engine, in the output directory of three commands."""
    try:
        server_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("demo") / "out"
    quantize = ["quantize", "--model-path", CHECKPOINT, "--config", "int4_w4only_rtn"]
    for command in (quantize, ["export"], ["build"]):
        answer = samq(*command, "--output-dir", out, "--quiet")
        assert answer.code == 0, answer.err
    return out


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    answer = samq("triton", "--output-dir", demo, "--store-mib", STORE_MIB)
    assert answer.code == 0, answer.err
    with serving(demo / "triton", tmp_path_factory.mktemp("server"), *LOCKED) as running:
        yield running


@pytest.fixture(scope="module")
def predictor(demo: Path) -> Predictor:
    return Predictor(*(OnnxRuntimeEngine(demo / "engines" / "onnxruntime" / f"{part}.onnx") for part in PARTS))


@pytest.fixture(scope="module")
def scenes(demo: Path, predictor: Predictor) -> list[Scene]:
    """Held-out scenes: as they are, enlarged, and cut narrow."""
    processor = SamProcessor.from_checkpoint(demo / "weights", 256)
    found = []
    for index, size in enumerate([(256, 256), (611, 340), (90, 250)]):
        drawn = HeldOutScenes()[index]
        image, truth = resized(drawn["image"], size), resized(drawn["masks"][0].astype(np.uint8), size) > 0
        box, click = box_of(truth), click_of(truth)
        seen = predictor.encode(processor(image).pixel_values)
        corners = processor.points_to_model(box.reshape(1, 2, 2), truth.shape).reshape(1, 4)
        by_box = predictor.decode(seen, boxes(corners).coords, boxes(corners).labels)
        point = clicks(processor.points_to_model(click[None], truth.shape))
        by_click = predictor.decode(seen, point.coords, point.labels)
        logits, score = by_box.best(0, ambiguous=False)
        masks = np.stack([mask_of(one, truth.shape) for one in by_click.masks[0, MULTI:]])
        scores = (score, by_click.scores[0, MULTI:])
        found.append(Scene(image, box, click, mask_of(logits, truth.shape), masks, scores))
    return found


def resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image [H, W, …] at another (width, height)."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST))


def same(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> bool:
    """But for pixels whose logit is zero to within rounding."""
    return found.shape == expected.shape and np.count_nonzero(found != expected) <= 2e-4 * expected.size


def http_client(server: Server) -> Any:
    """Triton's own client."""
    return tritonclient.http.InferenceServerClient(server.http)


@dataclass(frozen=True)
class Counts:
    """What a model has done, by the server's statistics."""

    images: int
    executions: int

    @classmethod
    def of(cls, server: Server, model: str) -> Counts:
        with http_client(server) as client:
            counts = client.get_inference_statistics(model)["model_stats"][0]
        return cls(int(counts["inference_count"]), int(counts["execution_count"]))

    @classmethod
    def settled(cls, server: Server, model: str, images: int | None = None) -> Counts:
        """Triton counts a request after it has answered: read until so many images are counted, or nothing is added."""
        until, found = time.monotonic() + COUNTING_TIMEOUT, cls.of(server, model)
        while time.monotonic() < until and found.images != images:
            time.sleep(0.2)
            earlier, found = found, cls.of(server, model)
            if images is None and found == earlier:
                break
        return found


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_masks_are_those_of_the_engine_in_this_process(server: Server, scenes: list[Scene], protocol: Protocol) -> None:
    with SamClient(getattr(server, protocol), protocol) as client:
        for scene in scenes:
            answer = client.predict(scene.image, boxes=scene.box[None])
            assert 0.02 < scene.box_mask.mean() < 0.98
            assert same(answer.masks[0, 0], scene.box_mask)
            assert answer.scores[0, 0] == pytest.approx(scene.scores[0], abs=1e-4)
            several = client.predict(handle=answer.handle, points=[[scene.click]], multimask=True)
            assert same(several.masks[0], scene.click_masks)
            np.testing.assert_allclose(several.scores[0], scene.scores[1], atol=1e-4)
            one = client.predict(handle=answer.handle, points=[[scene.click]])
            assert same(one.masks[0, 0], scene.click_masks[scene.scores[1].argmax()])


def test_ten_clicks_on_one_image_run_the_encoder_once(server: Server, scenes: list[Scene]) -> None:
    scene, clicked = scenes[0], np.random.default_rng(0).uniform(0, 256, (10, 1, 1, 2))
    before = {model: Counts.settled(server, model).images for model in MODELS.values()}
    with SamClient(server.http) as client:
        handle = client.predict(scene.image).handle
        answers = [client.predict(handle=handle, points=points) for points in clicked]
        for model, more in (("sam_image_encoder", 1), ("sam_mask_decoder", 10)):
            expected = before[model] + more
            assert Counts.settled(server, model, expected).images == expected
        for points, answer in zip(clicked, answers, strict=True):
            assert answer.handle == handle
            assert (client.predict(scene.image, points=points).masks == answer.masks).all()


def test_an_answer_is_refined_with_its_own_logits(server: Server, scenes: list[Scene]) -> None:
    scene = scenes[0]
    with SamClient(server.http) as client:
        first = client.predict(scene.image, points=[[scene.click]])
        refined = client.predict(handle=first.handle, points=[[scene.click]], mask_input=first.logits[:, 0])
        assert not np.array_equal(refined.logits, first.logits)
        assert (refined.masks[0, 0] & first.masks[0, 0]).sum() > 0.5 * first.masks[0, 0].sum()


def test_many_prompts_in_one_request_are_answered_one_by_one(server: Server, scenes: list[Scene]) -> None:
    corners = np.random.default_rng(0).uniform(0, 120, (20, 4)).astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    with SamClient(server.http) as client:
        together = client.predict(scenes[0].image, boxes=corners)
        assert together.masks.shape == (20, 1, 256, 256)
        for index in (0, 7, 19):
            alone = client.predict(handle=together.handle, boxes=corners[index : index + 1])
            assert same(together.masks[index], alone.masks[0])


def test_two_images_in_one_request(server: Server, scenes: list[Scene]) -> None:
    one, other = scenes[0], np.ascontiguousarray(scenes[0].image[::-1])
    feeds = {"image": np.stack([one.image, other]), "boxes": np.stack([one.box[None]] * 2)}
    with http_client(server) as client:
        answer = client.infer("sam", inputs_of(feeds, tritonclient.http))
    masks, (first, second) = answer.as_numpy("masks"), answer.as_numpy("handle")[:, 0]
    assert masks.shape == (2, 1, 1, 256, 256)
    assert same(masks[0, 0, 0], one.box_mask)
    assert not same(masks[1, 0, 0], one.box_mask)
    assert first != second


def test_the_store_forgets_the_image_that_was_used_least_recently(server: Server, scenes: list[Scene]) -> None:
    with SamClient(server.http) as client:
        handles = [client.predict(scenes[2].image).handle for _ in range(IMAGES_KEPT)]
        client.predict(handle=handles[0], points=[[[1, 1]]])
        client.predict(scenes[2].image)
        client.predict(handle=handles[0], points=[[[1, 1]]])
        with pytest.raises(BadInput, match="unknown handle"):
            client.predict(handle=handles[1], points=[[[1, 1]]])


def test_an_image_is_kept_only_for_clients_that_want_its_handle(server: Server, scenes: list[Scene]) -> None:
    with SamClient(server.http) as client, http_client(server) as raw:
        handle = client.predict(scenes[2].image).handle
        wanted = [tritonclient.http.InferRequestedOutput("masks")]
        feeds = {"image": scenes[2].image[None], "boxes": np.array([[[1, 1, 9, 9]]], np.float32)}
        for _ in range(IMAGES_KEPT):
            raw.infer("sam", inputs_of(feeds, tritonclient.http), outputs=wanted)
        assert client.predict(handle=handle, points=[[[1, 1]]]).handle == handle


IMAGE = np.zeros((1, 20, 30, 3), np.uint8)
BOX = np.array([[[1, 2, 9, 8]]], np.float32)
POINT = np.array([[[[3, 4]]]], np.float32)
BAD: dict[str, Bad] = {
    "nothing": ("sam", {"boxes": BOX}, "either an image or the handle"),
    "image and handle": ("sam", {"image": IMAGE, "handle": np.array([[b"x"]], np.object_)}, "either an image or"),
    "grey image": ("sam", {"image": IMAGE[..., :1], "boxes": BOX}, "[-1,-1,-1,3]"),
    "image without batch": ("sam", {"image": IMAGE[0], "boxes": BOX}, "batch size"),
    "float image": ("sam", {"image": IMAGE.astype(np.float32), "boxes": BOX}, "UINT8"),
    "empty image": ("sam", {"image": IMAGE[:, :0], "boxes": BOX}, "30 × 0 pixels"),
    "huge image": ("sam", {"image": np.zeros((1, 1, 50_000_001, 3), np.uint8)}, "max_image_pixels"),
    "huge masks": (
        "sam",
        {"image": np.zeros((1, 2000, 2000, 3), np.uint8), "boxes": np.repeat(BOX, 60, 1)},
        "max_mask",
    ),
    "NaN box": ("sam", {"image": IMAGE, "boxes": np.full_like(BOX, np.nan)}, "NaN"),
    "infinite point": ("sam", {"image": IMAGE, "points": np.full_like(POINT, np.inf)}, "infinite"),
    "far point": ("sam", {"image": IMAGE, "points": 1e6 * POINT}, "far outside the image of 30 × 20"),
    "box inside out": ("sam", {"image": IMAGE, "boxes": BOX[..., ::-1]}, "x1 ≤ x2"),
    "label": ("sam", {"image": IMAGE, "points": POINT, "labels": np.array([[[2]]], np.int32)}, "label 2"),
    "labels alone": ("sam", {"image": IMAGE, "labels": np.array([[[1]]], np.int32)}, "labels without points"),
    "labels of other points": (
        "sam",
        {"image": IMAGE, "points": POINT, "labels": np.ones((1, 1, 2), np.int32)},
        "labels are [1, 2]",
    ),
    "boxes and points": ("sam", {"image": IMAGE, "points": POINT, "boxes": np.repeat(BOX, 2, 1)}, "1 prompts and 2"),
    "no prompt": ("sam", {"image": IMAGE, "boxes": BOX[:, :0]}, "0 prompts"),
    "too many prompts": ("sam", {"image": IMAGE, "boxes": np.repeat(BOX, 65, 1)}, "65 prompts; send 1 to 64"),
    "too many points": ("sam", {"image": IMAGE, "points": np.repeat(POINT, 65, 2)}, "65 points a prompt"),
    "mask of another size": (
        "sam",
        {"image": IMAGE, "boxes": BOX, "mask_input": np.zeros((1, 1, 9, 9), np.float32)},
        "[-1,-1,64,64]",
    ),
    "NaN mask": ("sam", {"image": IMAGE, "boxes": BOX, "mask_input": np.full((1, 1, 64, 64), np.nan, "f4")}, "finite"),
    "unknown handle": ("sam", {"handle": np.array([[b"../../etc"]], np.object_), "boxes": BOX}, "unknown handle"),
    "handle of no text": ("sam", {"handle": np.array([[b"\xff\x00"]], np.object_), "boxes": BOX}, "unknown handle"),
    "different batches": ("sam", {"image": IMAGE, "boxes": np.repeat(BOX, 2, 0)}, "batch"),
    "encoder's shape": ("sam_image_encoder", {"pixel_values": np.zeros((1, 3, 64, 64), np.float32)}, "[-1,3,256,256]"),
    "unknown model": ("sam3", {"image": IMAGE}, "unknown model"),
}


def inputs_of(feeds: dict[str, NDArray[Any]], module: Any) -> list[Any]:
    """Arrays as a protocol's inputs."""
    kinds = {np.object_: "BYTES", np.uint8: "UINT8", np.float32: "FP32", np.int32: "INT32", np.int64: "INT64"}
    inputs = []
    for name, array in feeds.items():
        entry = module.InferInput(name, list(array.shape), kinds[array.dtype.type])
        entry.set_data_from_numpy(np.ascontiguousarray(array))
        inputs.append(entry)
    return inputs


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_clean_line(server: Server, name: str, module: Any) -> None:
    model, feeds, words = BAD[name]
    url = server.http if module is tritonclient.http else server.grpc
    with module.InferenceServerClient(url) as client:
        with pytest.raises(tritonclient.http.InferenceServerException) as caught:
            client.infer(model, inputs_of(feeds, module))
        assert caught.value.status() in ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
        message = caught.value.message()
        assert words in message
        assert not any(secret in message for secret in ("Traceback", ".py", "shm", "/tmp"))
        assert client.is_server_ready()


def test_the_decoder_refuses_sides_that_do_not_fit(server: Server, predictor: Predictor) -> None:
    def feeds(prompts: int, labels: int) -> dict[str, NDArray[Any]]:
        sides = {"batch": 1, "prompts": prompts, "points": 1}
        zeros = {
            name: np.zeros([side if isinstance(side, int) else sides[side] for side in shape], np.float32)
            for name, shape in predictor.decoder.shapes.items()
        }
        return zeros | {"point_labels": np.zeros((1, labels, 1), np.int64)}

    with http_client(server) as client:
        for wrong, words in ((feeds(65, 65), "1 to 64"), (feeds(2, 3), "prompts"), (feeds(0, 0), "prompts")):
            with pytest.raises(tritonclient.http.InferenceServerException, match=words):
                client.infer("sam_mask_decoder", inputs_of(wrong, tritonclient.http))
        right = client.infer("sam_mask_decoder", inputs_of(feeds(2, 2), tritonclient.http))
        assert right.as_numpy("masks").shape == (1, 2, 4, 64, 64)


@pytest.mark.parametrize(("module", "header"), [(tritonclient.http, "admin"), (tritonclient.grpc, GRPC_HEADER)])
def test_administration_is_closed_to_those_without_the_key(server: Server, module: Any, header: str) -> None:
    """As docs/triton.md recommends; the other tests show that requests need no key."""
    url = server.http if module is tritonclient.http else server.grpc
    with module.InferenceServerClient(url) as client:
        for closed in (
            lambda: client.get_model_repository_index(),
            lambda: client.load_model("sam"),
            lambda: client.register_system_shared_memory("mine", "/any", 64),
            lambda: client.get_model_config("sam"),
        ):
            with pytest.raises(tritonclient.http.InferenceServerException, match="restricted"):
                closed()
        assert client.get_model_config("sam", headers={header: "secret"})


def test_load_leaves_no_error_no_wrong_mask_and_no_growth(server: Server, scenes: list[Scene]) -> None:
    """Clients send new images, click on them again, and make mistakes; what leaks would grow in every round."""

    def visit(number: int) -> None:
        choose = random.Random(number)
        protocol: Protocol = choose.choice(("http", "grpc"))
        with SamClient(getattr(server, protocol), protocol) as client:
            for _ in range(IMAGES_EACH):
                scene = choose.choice(scenes)
                answer = client.predict(scene.image, boxes=scene.box[None])
                assert same(answer.masks[0, 0], scene.box_mask)
                with pytest.raises(BadInput, match="NaN"):
                    client.predict(scene.image, points=[[[np.nan, 0]]])
                with contextlib.suppress(BadInput):  # where the other clients sent more images than are kept
                    again = client.predict(handle=answer.handle, points=[[scene.click]], multimask=True)
                    assert same(again.masks[0], scene.click_masks)

    memory = [resident(server)]
    for turn in range(MOST_ROUNDS):
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(visit, range(CLIENTS * turn, CLIENTS * (turn + 1))))
        memory.append(resident(server))
        if turn >= LEAST_ROUNDS and memory[-1] - memory[-2] < LEAK:
            return
    pytest.fail(f"the server's memory grew in every round: {memory}")


def resident(server: Server) -> int:
    """Bytes of memory of all the server's processes."""
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in server.pids())
    return sum(pages) * resource.getpagesize()


def test_requests_side_by_side_are_batched_for_the_encoder(server: Server, scenes: list[Scene]) -> None:
    def visit(scene: Scene) -> None:
        with SamClient(server.grpc, "grpc") as client:
            for _ in range(4):
                client.predict(scene.image)

    before = Counts.settled(server, "sam_image_encoder")
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(visit, scenes * 2))
    after = Counts.settled(server, "sam_image_encoder", before.images + 24)
    assert after.images - before.images == 24
    assert after.executions - before.executions < 24


@pytest.fixture(params=[tuple(MOST)])
def with_tensorrt(demo: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The same job with dummy plans for two GPUs, laid out for a server without one; the parameter: dynamic sides."""
    outs = [tmp_path / "hopper", tmp_path / "ada"]
    for out, capability in zip(outs, ((9, 0), (8, 9)), strict=True):
        shutil.copytree(demo, out, ignore=shutil.ignore_patterns("triton"))
        with_plans(out, capability, dynamic=request.param)
    answer = samq("triton", "--output-dir", outs[0], "--plans-of", outs[1])
    assert answer.code == 0, answer.err
    repository = outs[0] / "triton"
    for model in MODELS.values():
        config = repository / model / "config.pbtxt"
        config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))
    return repository


def test_this_server_reads_the_configs_of_plans_and_lacks_only_the_backend(with_tensorrt: Path, tmp_path: Path) -> None:
    options = ("--exit-on-error=false", "--strict-readiness=false")
    with serving(with_tensorrt, tmp_path / "server", *options) as server, http_client(server) as client:
        index = {entry["name"]: entry for entry in client.get_model_repository_index()}
    assert index["sam"]["state"] == "READY"
    for model in MODELS.values():
        assert index[model]["state"] == "UNAVAILABLE"
        assert "unable to find backend library for backend 'tensorrt'" in index[model]["reason"]


@pytest.mark.parametrize(
    "with_tensorrt", [tuple(MOST), ("prompts", "points")], ids=["any images", "one image"], indirect=True
)
def test_sam_asks_plans_in_fp16_and_in_portions(
    with_tensorrt: Path, demo: Path, scenes: list[Scene], tmp_path: Path
) -> None:
    """With a stand-in for the TensorRT backend that runs ONNX files; all else is as it would be there."""
    for part, model in MODELS.items():
        version = with_tensorrt / model / "1"
        shutil.copy(demo / "engines" / "onnxruntime" / f"{part}.onnx", version / "model_cc8.9.plan")
    (tmp_path / "server" / "backends" / "tensorrt").mkdir(parents=True)
    stand_in = Path(__file__).with_name("tensorrt_stand_in.py")
    shutil.copy(stand_in, tmp_path / "server" / "backends" / "tensorrt" / "model.py")
    with (with_tensorrt / "requirements.txt").open("a") as file:
        file.write("onnxruntime\n")
    with serving(with_tensorrt, tmp_path / "server") as server, SamClient(server.http) as client:
        for scene in scenes:
            answer = client.predict(scene.image, boxes=np.repeat(scene.box[None], 2 * MOST["prompts"] + 1, axis=0))
            for mask in answer.masks[:, 0]:
                assert np.count_nonzero(mask != scene.box_mask) < 0.01 * mask.size
            clicked = client.predict(handle=answer.handle, points=[[scene.click]]).masks[0, 0]
            expected = scene.click_masks[scene.scores[1].argmax()]
            assert np.count_nonzero(clicked != expected) < 0.01 * expected.size
        with pytest.raises(BadInput, match="8 points a prompt; send 1 to 7"):
            client.predict(handle=answer.handle, points=np.ones((1, MOST["points"] + 1, 2)))


def test_the_client_command_writes_the_mask(server: Server, scenes: list[Scene], tmp_path: Path) -> None:
    scene, out = scenes[1], tmp_path / "mask.png"
    Image.fromarray(scene.image).save(tmp_path / "photo.png")
    box, click = (",".join(map(str, mark)) for mark in (scene.box, scene.click))
    answer = samq(
        "client", "--image", tmp_path / "photo.png", "--box", box, "--out", out, "--url", server.http, "--json"
    )
    assert answer.code == 0, answer.err
    written = np.asarray(Image.open(out))
    assert same(written > 0, scene.box_mask)
    assert set(np.unique(written)) == {0, 255}
    assert answer.json["pixels"] == np.count_nonzero(written)
    handle = answer.json["handle"]
    more = ["--point", click, "--point", "1,1,0", "--url", server.grpc, "--protocol", "grpc"]
    answer = samq("client", "--handle", handle, *more, "--out", out)
    assert answer.code == 0, answer.err
    assert f"handle for further clicks: {handle}" in answer.out
    assert np.asarray(Image.open(out)).shape == scene.box_mask.shape


def test_the_client_command_tells_what_the_server_refuses(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "mask.png"
    answer = samq("client", "--handle", "gone", "--point", "1,1", "--out", out, "--url", server.http)
    refused(answer, 6, "unknown handle", "send the image again")
    assert not out.exists()


def test_a_server_that_is_gone_is_one_line(server: Server) -> None:
    with (
        SamClient("127.0.0.1:9", timeout=5) as client,
        pytest.raises(MachineLacks, match=r"no answer from 127\.0\.0\.1:9"),
    ):
        client.predict(IMAGE[0])

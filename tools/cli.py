"""`samq-export`: the command line.

Exit codes: 0 done · 2 bad usage or config · 3 accuracy gate missed · 4 engine slower than asked · 5 the machine lacks
what was asked for · 6 bad input data, checkpoint or output directory · 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click

from samq import __version__
from samq.errors import AccuracyGateMissed, SamqError, SpeedGateMissed, UsageError

if TYPE_CHECKING:
    from samq.tools.job import Job

PARTS = ("image_encoder", "mask_decoder")  # as in samq.calib.parts, which would import torch for every --help
FORMS = ("fp16", "mlp", "branch", "branch-32", "branch-16", "branch-8", "int8", "fold")  # as in samq.export.placement
LARGEST = {  # of a TensorRT plan's dynamic sides: as in samq.engines.tensorrt_plan, and what they are
    "batch": (4, "Most images at a time of a TensorRT plan, with --dynamic-shapes."),
    "prompts": (16, "Most prompts at a time of a TensorRT plan; more than that come one after the other."),
    "points": (16, "Most points a prompt of a TensorRT plan."),
}
DEFAULT_CONFIG = "int4_svdquant"
INTERRUPTED, BUG = 130, 1
PATIENT = ("OMP_WAIT_POLICY", "PASSIVE")
"""PyTorch's threads sleep while they wait for each other. By default they spin, and where other processes want the same
cores each of its many short steps then waits for a thread that is not running."""

_answers: ContextVar[TextIO] = ContextVar("answers", default=sys.stdout)  # where --json's object goes

EPILOG = """
\b
Exit codes: 0 done; 2 bad usage or config; 3 accuracy gate missed;
4 engine slower than asked; 5 the machine lacks what was asked for;
6 bad input data, checkpoint or output directory; 130 interrupted.
"""

F = TypeVar("F", bound=Callable[..., Any])


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order given."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _parse_names(*names: str) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...]]:
    """A callback for a list with commas of some of the names; nothing where the option is not given."""

    def callback(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
        if value is None:
            return ()
        chosen = [name.strip() for name in value.split(",") if name.strip()]
        wrong = [name for name in chosen if name not in names]
        if wrong or not chosen:
            raise click.BadParameter(f"{', '.join(wrong) or 'nothing'} given; choose from {', '.join(names)}")
        return tuple(name for name in names if name in chosen)

    return callback


def _parse_placement(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return value if value in (None, "none", "shipped") else str(Path(str(value)).expanduser().resolve())


def _parse_timing_cache(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None or value == "none":
        return value
    return str(click.Path(file_okay=False, resolve_path=True).convert(value, parameter, context))


def _parse_numbers(*counts: int) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback for one value, or several of a repeated option, of so many numbers with commas between them."""

    def parse(text: str) -> list[float]:
        try:
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in counts:
            raise click.BadParameter(f"{text!r} is not {' or '.join(map(str, counts))} numbers separated by commas")
        return numbers

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if value is None:
            return None
        return parse(value) if isinstance(value, str) else [parse(text) for text in value]

    return callback


_output = click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Directory of the results.")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, messages on stderr.")
_talk = _options(
    _json,
    click.option("--quiet", is_flag=True, help="No messages but errors."),
)
_device = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="For calibration, PTQ and ONNX Runtime.  [default: cpu, or as in the stages before]",
)
_builder = _options(
    click.option("--optimization-level", type=click.IntRange(0, 5), help="How long TensorRT searches.  [default: 3]"),
    click.option("--workspace-mib", type=click.IntRange(1), help="Limit of TensorRT's scratch memory."),
    click.option(
        "--timing-cache",
        metavar="FOLDER|none",
        callback=_parse_timing_cache,
        help="Where TensorRT's kernel timings are kept and used again.  [default: samq/tensorrt-timings in the user's "
        "cache directory, where that can be written]",
    ),
)
_engine = _options(
    click.option(
        "--engine",
        type=click.Choice(["onnxruntime", "tensorrt"]),
        default="onnxruntime",
        show_default=True,
        help="What will run it: ONNX Runtime, on the --device, or TensorRT.",
    ),
    _builder,
    click.option("--version-compatible", is_flag=True, help="TensorRT plans for later versions of the same major one."),
    click.option("--hardware-compatible", is_flag=True, help="TensorRT plans for every GPU from Ampere on; slower."),
    click.option("--refittable", is_flag=True, help="TensorRT plans whose weights can be replaced."),
    click.option(
        "--refit",
        type=click.Path(file_okay=False, path_type=Path),
        help="Build no TensorRT plans: take the --refittable ones of this output directory, made from the same graphs "
        "with other weights, and give them this job's.",
    ),
    *(
        click.option(f"--max-{side}", type=click.IntRange(1), help=f"{what}  [default: {most}]")
        for side, (most, what) in LARGEST.items()
    ),
)
_target = _options(
    click.option(
        "--target",
        type=click.Choice(["trt8", "trt10", "trt11"]),
        help="Lower for this TensorRT: 8.6, 10 or 11.  [default: the one at hand]",
    ),
    click.option(
        "--low-rank",
        type=click.Choice(["branch", "fold", "auto"]),
        help="In TensorRT: low-rank branches beside INT8 GEMMs, or added to the INT8 weights; auto: added, unless that "
        "misses --min-relative-miou (0.995 where none is given).  [default: branch]",
    ),
    click.option(
        "--placement",
        metavar="FILE|none|shipped",
        callback=_parse_placement,
        help="Which layers run in INT8 on TensorRT, and which in FP16; none: all of them in INT8.  [default: as in the "
        "stages before, where one was given, else shipped: as measured for this GPU, where samq ships that]",
    ),
)
_what = _options(
    click.option(
        "--config", default=DEFAULT_CONFIG, show_default=True, help="A preset's name, or the path of a YAML file."
    ),
    click.option("--num-calib-samples", type=click.IntRange(1), help="Calibration images.  [default: the config's]"),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of every random choice."
    ),
    click.option(
        "--parts",
        default=",".join(PARTS),
        show_default=True,
        callback=_parse_names(*PARTS),
        help="Parts to quantize; the others stay float.",
    ),
    click.option("--image-size", type=click.IntRange(32), help="Side of the input in pixels.  [default: the model's]"),
    click.option("--force", is_flag=True, help="Overwrite another job's results in the output directory."),
    _device,
)
_dry_run = click.option("--dry-run", is_flag=True, help="Print what each layer will become, and write nothing.")
_model = _options(
    click.option(
        "--model-path",
        required=True,
        help="Checkpoint: a local directory, or a hub id such as facebook/sam2.1-hiera-tiny.",
    ),
    click.option(
        "--calib-data",
        help="Calibration images: a folder, a COCO .json file, or module:factory of a torch Dataset.",
    ),
    click.option("--allow-pickle", is_flag=True, help="Accept a pickled checkpoint (read with weights_only)."),
)
_static = click.option(
    "--static-shapes/--dynamic-shapes",
    default=None,
    help="Export for one image, one prompt and two points, or for any numbers. Static: clicks are filled up with a "
    "point that SAM 2 attends to, and get another answer.  [default: any numbers; for TensorRT and with --device cuda "
    "one image and any prompts of any points]",
)
_gates = _options(
    click.option("--min-relative-miou", type=click.FloatRange(0, 1), help="Exit 3 below this accuracy."),
    click.option(
        "--min-speedup",
        type=click.FloatRange(0),
        help="Exit 4 below this ratio to the baseline, FP32 on a CPU, FP16 on a GPU.",
    ),
)
_evaluation = _options(
    click.option(
        "--eval-data",
        help="Evaluation images: a folder, a COCO .json file, or module:factory.  [default: as in `run`, or some of "
        "--calib-data]",
    ),
    click.option(
        "--num-eval-samples", type=click.IntRange(1), help="Images to evaluate on.  [default: as in `run`, or 32]"
    ),
)


class _Ordered(click.Group):
    """Subcommands in the order of the job, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Ordered, epilog=EPILOG, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="samq-export")
def cli() -> None:
    """Quantize a Segment Anything model, and turn it into a checked engine.

    \b
    The whole job:    samq-export run --model-path DIR --calib-data PHOTOS --output-dir OUT
    On the demo:      samq-export demo --output-dir out/demo
    Stage by stage:   quantize, export, build, validate, each going on from OUT
    Speed here:       samq-export bench --output-dir OUT, in turns with the baseline
    INT8 or FP16:     samq-export place --output-dir OUT, measured on this GPU
    Bits by layer:    samq-export search --model-path DIR --calib-data PHOTOS --max-bytes N --output-dir OUT
    Several results:  samq-export compare OUT1 OUT2
    """


@cli.command()
@_model
@_what
@_dry_run
@_static
@_engine
@_target
@_evaluation
@_gates
@_output
@_talk
def run(**options: Any) -> None:
    """Quantize, export, build and validate.

    \b
    samq-export run --model-path facebook/sam2.1-hiera-tiny --config int4_w4a8 \\
        --calib-data ./photos --num-calib-samples 128 --output-dir ./out
    """
    _whole_job(options)


@cli.command()
@_what
@_dry_run
@_static
@_engine
@_target
@_evaluation
@_gates
@_output
@_talk
def demo(**options: Any) -> None:
    """`run` on the demo model that is shipped with samq."""
    from samq.quant.config import preset_names
    from samq.tools.demo.dataset import CALIBRATION_IMAGES, CHECKPOINT, IMAGES

    images = options["num_calib_samples"]
    if options["config"] in preset_names():  # which ask for more scenes than are shipped
        images = images or CALIBRATION_IMAGES
    _whole_job({**options, "model_path": str(CHECKPOINT), "calib_data": str(IMAGES), "num_calib_samples": images})


@cli.command()
@_model
@_what
@_dry_run
@_output
@_talk
def quantize(**options: Any) -> None:
    """Checkpoint and images to quantized weights."""
    _start(options, stages=("quantize",))


@cli.command()
@_static
@_target
@_device
@_output
@_talk
def export(**options: Any) -> None:
    """Quantized weights to Q/DQ ONNX, with the float baseline beside it.

    \b
    With --target also lowered for a TensorRT that need not be installed: engines/TARGET/.
    """
    names = ("static_shapes", "target", "low_rank", "placement", "device")
    _go_on(options, "export", **{name: options[name] for name in names})


@cli.command()
@_static
@_engine
@_target
@_device
@_output
@_talk
def build(**options: Any) -> None:
    """Q/DQ ONNX to an engine."""
    chosen = {name: options[name] for name in ("engine", "target", "low_rank", "placement", "device", "static_shapes")}
    _go_on(options, "build", build_options=_build_options(options), **chosen)


@cli.command()
@_evaluation
@_gates
@_output
@_talk
def validate(**options: Any) -> None:
    """Engine against baseline: accuracy, size, speed, and what was executed."""
    from samq.calib.sources import absolute

    eval_data = None if options["eval_data"] is None else absolute(options["eval_data"])
    _go_on(options, "validate", eval_data=eval_data, num_eval_samples=options["num_eval_samples"])


@cli.command()
@click.option(
    "--threads", type=click.IntRange(1), default=None, help="Of ONNX Runtime on the CPU.  [default: its own choice]"
)
@click.option(
    "--runs", type=click.IntRange(1), default=20, show_default=True, help="Timed runs of each engine and part."
)
@_output
@_talk
def bench(**options: Any) -> None:
    """Speed, start and memory of finished engines, in turns with the baseline's.

    \b
    samq-export bench --output-dir OUT
    Writes OUT/bench.json. Exit codes: 0 measured; 2 bad usage;
    5 the engines do not run here; 6 no finished engines.
    """
    from samq.tools.bench import as_text
    from samq.tools.bench import bench as measure
    from samq.tools.outdir import open_alone
    from samq.tools.progress import Reporter

    with open_alone(options["output_dir"], reads=True) as out:
        found = measure(out, Reporter(options["quiet"], _command()), options["threads"] or 0, options["runs"])
    if options["as_json"]:
        _print_json(found)
    elif not options["quiet"]:
        click.echo(as_text(found))


@cli.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML file; figures in it are not measured again.  [default: placement.yaml, in the output directory]",
)
@click.option(
    "--forms",
    callback=_parse_names(*FORMS),
    metavar="LIST",
    help=f"Of {', '.join(FORMS)}, with commas.  mlp is INT8 behind the attention alone, branch-8 keeps 8 components of "
    "a branch and folds the others.  [default: fp16, and int8, or branch and fold where there are branches; with "
    "--budget branches of every rank, too]",
)
@click.option(
    "--budget",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Time over the fastest placement, in percent of it, to spend where it removes most error per microsecond.",
)
@click.option(
    "--without",
    default="",
    metavar="LIST",
    help="Rewrites of the graph to leave out, to see what they gain, such as split_qkv,pair_max.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Blocks built at once, which takes a core and some GB each, and lets TensorRT choose kernels less well; they "
    "are timed one by one.",
)
@click.option("--eval-data", help="Take the image that blocks see from here.  [default: the job's images]")
@_builder
@_output
@_talk
def place(**options: Any) -> None:
    """Measure which blocks run in INT8 on this GPU's TensorRT.

    \b
    samq-export export --output-dir OUT --target trt8
    samq-export place --output-dir OUT
    samq-export build --output-dir OUT --engine tensorrt --placement OUT/placement.yaml
    """
    from samq.calib.sources import absolute
    from samq.engines.tensorrt_plan import BuildOptions
    from samq.tools.outdir import PLACEMENT, open_alone
    from samq.tools.place import place as measure
    from samq.tools.place import table
    from samq.tools.progress import Reporter
    from samq.tools.targets import TIMING_CACHE, with_timings

    path = options["out"] or options["output_dir"] / PLACEMENT
    reporter = Reporter(options["quiet"], _command())
    chosen = _build_options({**options, "engine": "tensorrt"})
    timings = chosen.pop(TIMING_CACHE, None)
    with open_alone(options["output_dir"], reads=True) as out:
        placement = measure(
            out,
            path,
            reporter,
            forms=options["forms"],
            without=[name.strip() for name in options["without"].split(",") if name.strip()],
            options=with_timings(BuildOptions.from_json(chosen), timings, reporter),
            budget=options["budget"] / 100,
            jobs=options["jobs"],
            eval_data=None if options["eval_data"] is None else absolute(options["eval_data"]),
        )
    if options["as_json"]:
        _print_json({"file": str(path), **placement.model_dump()})
    elif not options["quiet"]:
        click.echo("\n".join(table(placement)))
        click.echo(f"Done: {path}; give it as --placement")


@cli.command()
@_model
@_what
@click.option("--max-bytes", type=click.IntRange(1), help="The best config of at most so many bytes of weights.")
@click.option(
    "--min-relative-miou",
    type=click.FloatRange(0, 1),
    help="The smallest config that reaches this; exit 3 if none does.",
)
@click.option(
    "--candidates",
    default="float,int8,int4,int4-rank8",
    show_default=True,
    metavar="LIST",
    help="Forms that a layer may have: float, int8, int4, int4-rankR.",
)
@click.option(
    "--sensitivity-images",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Calibration images on which each layer's effect on the masks is measured.",
)
@click.option(
    "--points",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Configs of the front to quantize and measure, besides those that the goal needs.",
)
@_evaluation
@_output
@_talk
def search(**options: Any) -> None:
    """Bits and rank for each layer, by what its quantization does to the masks.

    \b
    samq-export search --model-path DIR --calib-data PHOTOS --max-bytes 4000000 --output-dir OUT
    samq-export run --model-path DIR --calib-data PHOTOS --config OUT/search/best.yaml --output-dir OUT
    Bytes are those of all weights, as `run --dry-run` counts them. The front is in OUT/report/.
    """
    from samq.tools.job import FIELDS, Job, open_data
    from samq.tools.outdir import alone_in
    from samq.tools.progress import Reporter
    from samq.tools.search import Asked, Goal, as_text
    from samq.tools.search import search as find
    from samq.tools.stages import load, recipe_of

    if (options["max_bytes"] is None) == (options["min_relative_miou"] is None):
        raise UsageError("give either --max-bytes or --min-relative-miou")
    base = recipe_of(options["config"], options["num_calib_samples"])
    job = Job.of(base, model=options["model_path"], **{key: options.get(key) for key in FIELDS if key != "model"})
    asked = Asked(
        job=job,
        name=Path(options["config"]).stem,
        base=base,
        candidates=[name.strip() for name in options["candidates"].split(",") if name.strip()],
        goal=Goal(options["max_bytes"], options["min_relative_miou"]),
        images=options["sensitivity_images"],
        points=options["points"],
    )
    data = open_data(job, base)
    reporter = Reporter(options["quiet"], _command())
    float_model = load(job)
    with alone_in(options["output_dir"]):
        found = find(options["output_dir"], asked, float_model, data, reporter, options["force"])
    if options["as_json"]:
        _print_json(found)
    elif not options["quiet"]:
        click.echo(as_text(found))


@cli.command()
@_output
@click.option(
    "--repository",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to.  [default: triton, in the output directory]",
)
@click.option("--model-version", type=click.IntRange(1), default=1, show_default=True, help="Version of the models.")
@click.option(
    "--plans-of",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Output directory with TensorRT plans of the same graphs for another GPU; may be repeated.",
)
@click.option("--store-mib", type=click.IntRange(1), help="Memory for images to click on again.  [default: 1024]")
@click.option("--concurrency", type=click.IntRange(1), help="Requests answered side by side.  [default: 8]")
@click.option("--max-batch", type=click.IntRange(1), help="Images at a time, with --dynamic-shapes.  [default: 4]")
@_talk
def triton(**options: Any) -> None:
    """A model repository for Triton from a finished output directory.

    \b
    samq-export triton --output-dir ./out
    docs/triton.md says how to serve it.
    """
    from samq.tools.outdir import OutputDir, open_alone
    from samq.tools.triton.config import Serving
    from samq.tools.triton.layout import REPOSITORY, lay_out

    repository = options["repository"] or options["output_dir"] / REPOSITORY
    chosen = {name: options[name] for name in ("store_mib", "concurrency", "max_batch") if options[name] is not None}
    others = [OutputDir.open(path) for path in options["plans_of"]]
    with open_alone(options["output_dir"], reads=True) as out:
        engine = lay_out(out, repository, Serving(**chosen), others=others, model_version=options["model_version"])
    if options["as_json"]:
        _print_json({"repository": str(repository), "engine": engine.folder, "models": engine.models})
    elif not options["quiet"]:
        click.echo(f"Done: {repository} ({', '.join(engine.models)}; {engine.folder})")


@cli.command()
@click.option("--image", type=click.Path(path_type=Path), help="JPEG, PNG or WebP file.")
@click.option("--handle", help="Of an earlier answer, instead of an image.")
@click.option("--box", callback=_parse_numbers(4), metavar="X1,Y1,X2,Y2", help="Box around the object, in pixels.")
@click.option(
    "--point",
    "points",
    multiple=True,
    callback=_parse_numbers(2, 3),
    metavar="X,Y[,LABEL]",
    help="Point on the object, or beside it with label 0; may be repeated.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="PNG file of the mask.")
@click.option("--url", metavar="HOST:PORT", help="Of the server.  [default: localhost, at Triton's port]")
@click.option("--protocol", type=click.Choice(["http", "grpc"]), default="http", show_default=True)
@click.option("--ssl", is_flag=True, help="The server speaks TLS.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="Sent along, such as a token.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="Seconds.")
@_json
def client(**options: Any) -> None:
    """Ask a Triton server for the mask of an object.

    \b
    samq-export client --image photo.jpg --box 40,60,210,180 --out mask.png
    Exit codes: 0 written; 2 bad usage; 5 no server answers; 6 bad image or request.
    """
    from samq.calib.images import read_image
    from samq.tools.client import SamClient, save_mask

    if (options["image"] is None) == (options["handle"] is None):
        raise UsageError("give either --image or --handle")
    if options["box"] is None and not options["points"]:
        raise UsageError("give --box or --point")
    if any("=" not in header for header in options["headers"]):
        raise UsageError("a --header is NAME=VALUE")
    image = None if options["image"] is None else read_image(options["image"], str(options["image"]))
    box = None if options["box"] is None else [options["box"]]
    points = [[point[:2] for point in options["points"]]] if options["points"] else None
    labels = [[int(point[2]) if len(point) == 3 else 1 for point in options["points"]]] if points else None
    headers = dict(header.split("=", 1) for header in options["headers"])
    with SamClient(
        options["url"], options["protocol"], ssl=options["ssl"], headers=headers, timeout=options["timeout"]
    ) as server:
        answer = server.predict(image, handle=options["handle"], boxes=box, points=points, labels=labels)
    mask = answer.masks[0, 0]
    save_mask(options["out"], mask)
    found = {
        "mask": str(options["out"]),
        "pixels": int(mask.sum()),
        "size": [mask.shape[1], mask.shape[0]],
        "score": round(float(answer.scores[0, 0]), 4),
        "object_score": round(float(answer.object_scores[0]), 4),
        "handle": answer.handle,
    }
    if options["as_json"]:
        _print_json(found)
    else:
        click.echo(f"{found['mask']}: {found['pixels']} pixels, predicted IoU {found['score']:.3f}")
        click.echo(f"handle for further clicks: {answer.handle}")


@cli.command()
@click.argument("outputs", metavar="OUT1 OUT2 …", nargs=-1, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page: this file.")
@_json
def compare(outputs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Several finished output directories in one table.

    \b
    samq-export compare out/int4_w4a8 out/int4_svdquant --html compare.html
    Figures that cannot be compared with the first one's are marked.
    """
    from samq.files import write_text
    from samq.tools.report import compare as runs_compared

    runs = runs_compared.read_runs(outputs)
    if html is not None:
        write_text(html, runs_compared.compare_page(runs))
    if as_json:
        _print_json(runs_compared.as_json(runs))
    else:
        click.echo(runs_compared.as_text(runs))


@cli.command()
@_json
def doctor(as_json: bool) -> None:
    """What this machine can do, and what its engines would execute."""
    from samq.tools.doctor import as_text, examine

    facts = examine()
    if as_json:
        _print_json(facts)
    else:
        click.echo(as_text(facts))


def _build_options(options: dict[str, Any]) -> dict[str, Any]:
    """What the command line says about the TensorRT builder, as JSON values.

    Raises:
        UsageError: it says something, and the engine is another one.
    """
    from samq.engines.tensorrt_plan import USUAL_RANGES

    flags = ("version_compatible", "hardware_compatible", "refittable")
    names = ("optimization_level", "workspace_mib", *flags, "timing_cache")
    chosen = {name: options[name] for name in names if options.get(name) is not None and options[name] is not False}
    if any(options.get(f"max_{side}") for side in LARGEST):
        sizes = {side: (usual, options.get(f"max_{side}") or most) for side, (_, usual, most) in USUAL_RANGES.items()}
        chosen["ranges"] = {side: [1, min(usual, most), most] for side, (usual, most) in sizes.items()}
    if options.get("refit"):
        if chosen:
            raise UsageError(f"{', '.join(chosen)}: --refit takes plans as they were built; leave these out")
        chosen["refit"] = str(options["refit"].resolve())
    if chosen and options["engine"] != "tensorrt":
        raise UsageError(f"{', '.join(chosen)}: these are options of TensorRT's builder; add --engine tensorrt")
    return chosen


def _whole_job(options: dict[str, Any]) -> None:
    _start(options, stages=("quantize", "export", "build", "validate"))


def _start(options: dict[str, Any], stages: tuple[str, ...]) -> None:
    """Claim the output directory for a new job, or find it again, and run its stages."""
    from samq.quant.plan import make_plan, require_layers
    from samq.tools.gates import check_gates_can_be_told
    from samq.tools.job import FIELDS, Job, open_data
    from samq.tools.outdir import alone_in
    from samq.tools.plan_table import plan_as_json, print_plan
    from samq.tools.progress import Reporter
    from samq.tools.stages import claim, load, recipe_of, run_stages
    from samq.tools.targets import target_of

    reporter = Reporter(options["quiet"], _command())
    recipe = recipe_of(options["config"], options["num_calib_samples"])
    given = {key: options.get(key) for key in FIELDS if key not in ("model", "build_options")}
    job = Job.of(recipe, model=options["model_path"], build_options=_build_options(options), **given)
    if options["dry_run"]:
        model = load(job).model
        require_layers(make_plan(model, recipe, job.parts))
        if options["as_json"]:
            _print_json(plan_as_json(model, recipe, job.parts))
        else:
            print_plan(model, recipe, job.parts)
        return
    _check_placement(options, job, lowers=True)
    if "build" in stages:
        target_of(job).require()
    data = open_data(job, recipe)
    gates = (options.get("min_relative_miou"), options.get("min_speedup"))
    check_gates_can_be_told(data, gates)
    checkpoint = load(job)
    require_layers(make_plan(checkpoint.model, recipe, job.parts))
    with alone_in(options["output_dir"]):
        out = claim(options["output_dir"], job, recipe, checkpoint, data, options["force"])
        result = run_stages(out, job, recipe, stages, gates, reporter, data, checkpoint)
    _finish(options, result)


def _go_on(options: dict[str, Any], stage: str, **changes: Any) -> None:
    """Run one later stage of the job that an output directory holds."""
    from dataclasses import replace

    from samq.quant.config import load_recipe
    from samq.tools.job import Job, open_evaluation
    from samq.tools.outdir import open_alone
    from samq.tools.progress import Reporter
    from samq.tools.stages import run_stages

    with open_alone(options["output_dir"]) as out:
        out.require("quantize")
        job = replace(Job.from_json(out.job), **{key: value for key, value in changes.items() if value is not None})
        recipe = load_recipe(str(out.path / "config.yaml"))
        gates = (options.get("min_relative_miou"), options.get("min_speedup"))
        calibrated_on = out.detail("quantize", "calibration_fingerprint")
        data = open_evaluation(job, recipe, calibrated_on) if stage == "validate" else None
        _check_placement(options, job, lowers=stage == "export")
        result = run_stages(out, job, recipe, (stage,), gates, Reporter(options["quiet"], _command()), data)
    _finish(options, result)


def _check_placement(options: dict[str, Any], job: Job, *, lowers: bool) -> None:
    """Read a placement before anything is done.

    Args:
        lowers: graphs are lowered for the job's target, whatever its engine.

    Raises:
        UsageError: the command line gives one that no target heeds, or that cannot be read.
    """
    from samq.tools.targets import placement_of

    if options.get("placement") is None:
        return
    if job.engine != "tensorrt" and not (lowers and job.target is not None):
        fix = "add --engine tensorrt or --target" if lowers else "add --engine tensorrt"
        raise UsageError(f"--placement is for TensorRT; {fix}")
    placement_of(job)


def _command() -> list[str]:
    """The words that started samq."""
    return ["samq-export", *sys.argv[1:]]


def _finish(options: dict[str, Any], result: dict[str, Any]) -> None:
    from samq.tools.gates import missed_gate
    from samq.tools.report.verdict import verdict

    missed = missed_gate(result)
    if options["as_json"]:
        _print_json(result if missed is None else result | {"error": str(missed), "exit_code": missed.exit_code})
    elif options["quiet"]:
        pass
    elif "accuracy" in result:
        click.echo(verdict(result))
        click.echo(f"Report: {options['output_dir'] / 'report' / 'report.html'}")
    else:
        click.echo(f"Done: {options['output_dir']} ({', '.join(result['stages'])})")
    if missed is not None:
        raise missed


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2), file=_answers.get())


def main() -> NoReturn:
    """Entry point: every expected failure becomes one line and its exit code.

    With --json, stdout is for the answer alone: what users' data sets and libraries print goes to stderr.
    """
    os.environ.setdefault(*PATIENT)
    _answers.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr) if "--json" in sys.argv else contextlib.nullcontext():
            cli(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.UsageError as error:
        command = "samq-export" if error.ctx is None else error.ctx.command_path
        _fail(f"{error.format_message()} See `{command} --help`.", UsageError.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), UsageError.exit_code)
    except (AccuracyGateMissed, SpeedGateMissed) as error:
        _fail(str(error), error.exit_code, told=True)
    except SamqError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; the same command goes on with the finished stages", INTERRUPTED)
    except Exception as error:
        if "--json" in sys.argv:
            _print_json({"error": f"a bug of samq: {error!r}", "exit_code": BUG})
        raise
    sys.exit(0)


def _fail(message: str, exit_code: int, *, told: bool = False) -> NoReturn:
    """End with a line on stderr, and with an object on stdout unless one was `told` there."""
    if "--json" in sys.argv and not told:
        _print_json({"error": message, "exit_code": exit_code})
    click.echo(f"samq-export: {message}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()

"""``splitfleet bench``: every benchmark but the simulator's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ops import cli_cost

bench = typer.Typer(help="Measure, side by side with something plain.", no_args_is_help=True)
cli_cost.register(bench)


@bench.command("training")
def bench_training(
    *,
    widths: Annotated[str, typer.Option(help="e.g. 16,64")] = "16,64",
    windows: Annotated[str, typer.Option(help="e.g. 1,2")] = "1,2",
    seconds: Annotated[float, typer.Option(help="per measurement")] = 10.0,
    pairs: Annotated[int, typer.Option(help="interleaved pairs of measurements")] = 3,
    broker: Annotated[
        str | None, typer.Option("--broker", help="mqtt://HOST:PORT of the broker")
    ] = None,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare a fleet of one agent with plain PyTorch in one process."""
    from ops.bench_training import run_bench

    rows = run_bench(
        [int(width) for width in widths.split(",")],
        [int(window) for window in windows.split(",")],
        seconds=seconds,
        pairs=pairs,
        broker=broker,
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))


@bench.command("codec")
def bench_codec(
    *,
    codecs: Annotated[str | None, typer.Option(help="e.g. int8,int4+zstd; default: all")] = None,
    cuts: Annotated[str, typer.Option(help="where the tensors are taken")] = "1,2,3,4,5,6,7",
    dataset: Annotated[str, typer.Option(help="see docs/cli.md")] = "fashion-mnist-small",
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 16,
    train_batches: Annotated[int, typer.Option(help="of 32 images, before measuring")] = 3000,
    batch_size: Annotated[int, typer.Option(help="test images in the measured tensors")] = 32,
    repetitions: Annotated[int, typer.Option(help="of every timing; medians count")] = 15,
    append: Annotated[Path | None, typer.Option(help="append dated tables to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw error against bits: an SVG")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Bits, error and speed of every codec on tensors of a trained network, beside a plain one."""
    from ops.bench_codec import parse_cuts, run_bench

    result = run_bench(
        codecs.split(",") if codecs else None,
        cuts=parse_cuts(cuts),
        dataset=dataset,
        data_root=data_root,
        width=width,
        train_batches=train_batches,
        batch_size=batch_size,
        repetitions=repetitions,
        seed=seed,
        append=append,
        plot=plot,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result, indent=1))


@bench.command("rate-accuracy")
def bench_rate_accuracy(
    *,
    codecs: Annotated[
        str, typer.Option(help="ACTIVATION or ACTIVATION/GRADIENT, separated by commas")
    ] = "int8+zstd,int4+zstd,int3+zstd,int2+zstd",
    seeds: Annotated[int, typer.Option(help="paired runs of every codec")] = 5,
    dataset: Annotated[str, typer.Option(help="see docs/cli.md")] = "fashion-mnist-small",
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    train_images: Annotated[int | None, typer.Option(help="as many of each class")] = None,
    rounds: Annotated[int, typer.Option(help="passes over the training images")] = 4,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 16,
    device: Annotated[str, typer.Option(help="where it is computed")] = "cpu",
    jobs: Annotated[int | None, typer.Option(help="runs at once; default: one per core")] = None,
    out: Annotated[Path, typer.Option(help="finished runs are kept here, and not made again")] = (
        Path("runs/rate-accuracy")
    ),
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw accuracy against bytes: an SVG")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Train a small fleet with each codec: what do fewer bytes cost in accuracy?"""
    from ops.bench_rate_accuracy import run_bench
    from ops.rate_accuracy import Setup

    rows = run_bench(
        codecs.split(","),
        Setup(dataset, train_images, rounds, width, device),
        seeds=seeds,
        jobs=jobs or os.cpu_count() or 1,
        data_root=data_root,
        out=out,
        append=append,
        plot=plot,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))


@bench.command("reconstruction")
def bench_reconstruction(
    *,
    cuts: Annotated[str, typer.Option(help="where features are taken")] = "1,3,5,7,9",
    codec: Annotated[str, typer.Option(help="of features")] = "int4+zstd",
    noise: Annotated[
        str, typer.Option(help="its norm for that of the features, which are clipped to that")
    ] = "1,4,16",
    images: Annotated[int, typer.Option(help="test images that are attacked")] = 8,
    steps: Annotated[int, typer.Option(help="of each try of the attack")] = 200,
    dataset: Annotated[str, typer.Option(help="see docs/cli.md")] = "fashion-mnist-small",
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 16,
    train_batches: Annotated[int, typer.Option(help="of 32 images, before all else")] = 500,
    tune_batches: Annotated[int, typer.Option(help="with what is sent, for each row")] = 40,
    append: Annotated[Path | None, typer.Option(help="append a dated table to this file")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Reconstruct images from the features that devices send: how alike, at what accuracy?"""
    from ops.bench_codec import parse_cuts
    from ops.bench_reconstruction import Setup, run_bench

    result = run_bench(
        Setup(
            cuts=tuple(parse_cuts(cuts)),
            codec=codec,
            noise=cli_cost.numbers("noise", noise, float),
            dataset=dataset,
            width=width,
            train_batches=train_batches,
            tune_batches=tune_batches,
            images=images,
            steps=steps,
            seed=seed,
        ),
        data_root=data_root,
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result, indent=1))


@bench.command("server")
def bench_server(
    *,
    widths: Annotated[str, typer.Option(help="e.g. 16,64")] = "16,64",
    pairs: Annotated[int, typer.Option(help="interleaved measurements of every way")] = 7,
    seconds: Annotated[float, typer.Option(help="per measurement")] = 2.0,
    seeds: Annotated[int, typer.Option(help="paired trainings of every way; 0: only speed")] = 3,
    train_images: Annotated[int, typer.Option(help="as many of each class")] = 4000,
    rounds: Annotated[int, typer.Option(help="passes over the training images")] = 4,
    together: Annotated[int, typer.Option(help="the most batches in one step of a cascade")] = 4,
    rate_rule: Annotated[str, typer.Option(help="linear, sqrt, none or momentum")] = "momentum",
    device: Annotated[str, typer.Option(help="where it is computed")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or auto")] = "auto",
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Train on batches of several devices in turn, batched by cut, and in a cascade."""
    from ops.bench_server import Setup, run_bench

    rows = run_bench(
        [int(width) for width in widths.split(",")],
        Setup(
            train_images,
            rounds,
            together=together,
            rate_rule=rate_rule,  # type: ignore[arg-type]
            device=device,
            precision=precision,  # type: ignore[arg-type]
        ),
        pairs=pairs,
        seconds=seconds,
        seeds=seeds,
        data_root=data_root,
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))


@bench.command("experiment")
def bench_experiment(
    *,
    pairs: Annotated[int, typer.Option(min=1, help="interleaved measurements of both")] = 7,
    rounds: Annotated[int, typer.Option(min=1, help="per measurement")] = 6,
    batches: Annotated[int, typer.Option(min=1, help="of each of the 4 devices in a round")] = 10,
    dataset: Annotated[str, typer.Option(help="see docs/cli.md")] = "cifar10",
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 16,
    batch_size: Annotated[int, typer.Option()] = 32,
    window: Annotated[int, typer.Option(help="batches that a device may have out")] = 1,
    device: Annotated[str, typer.Option(help="where it is computed")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "bf16",
    memory_format: Annotated[str, typer.Option(help="contiguous or channels_last")] = (
        "channels_last"
    ),
    resident: Annotated[bool, typer.Option(help="make batches on the compute device")] = False,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    append: Annotated[Path | None, typer.Option(help="append a dated row to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Train a fleet in one process, and the same in a plain PyTorch loop: how fast is it?"""
    from ops.bench_experiment import Setup, run_bench

    row = run_bench(
        Setup(
            dataset=dataset,
            width=width,
            batch_size=batch_size,
            rounds=rounds,
            batches=batches,
            device=device,
            precision=precision,  # type: ignore[arg-type]
            memory_format=memory_format,  # type: ignore[arg-type]
            window=window,
            resident=resident,
        ),
        pairs=pairs,
        data_root=data_root,
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(row, indent=1))


@bench.command("inference")
def bench_inference(
    *,
    parts: Annotated[str, typer.Option(help="of latency and batching")] = "latency,batching",
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 16,
    rate: Annotated[float, typer.Option(min=1, help="latency: questions a second")] = 100.0,
    seconds: Annotated[float, typer.Option(min=1, help="latency: how long")] = 60.0,
    pairs: Annotated[int, typer.Option(min=1, help="batching: together and one by one")] = 3,
    broker: Annotated[
        str | None, typer.Option("--broker", help="mqtt://HOST:PORT of the broker")
    ] = None,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What it costs to ask the coordinator about an image, and what answering together brings."""
    from ops.bench_inference import run_bench

    rows = run_bench(
        parts.split(","),
        width=width,
        rate=rate,
        seconds=seconds,
        pairs=pairs,
        broker=broker,
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))


@bench.command("inference-link")
def bench_inference_link(
    *,
    state_dir: Annotated[
        Path, typer.Option(help="of a coordinator whose run has closed rounds")
    ] = (Path("coordinator-state")),
    thresholds: Annotated[
        str, typer.Option(help="beside −1, edge only, and 1, cloud only")
    ] = "0.2,0.4,0.5,0.6,0.7,0.8,0.9,0.97",
    images: Annotated[int, typer.Option(help="test images for each device")] = 500,
    rate: Annotated[float, typer.Option(help="images a second for each device, the mean")] = 10.0,
    delay_ms: Annotated[float, typer.Option(help="of the link, one way")] = 20.0,
    mbit_per_s: Annotated[float, typer.Option(help="of the link, in each direction")] = 10.0,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the curves over thresholds: an SVG")] = (
        None
    ),
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Answer test images over a slow link: accuracy, latency and bytes for each threshold."""
    from ops.bench_inference_link import Setup, parse_thresholds, run_link

    rows = run_link(
        state_dir,
        Setup(
            images=images,
            images_per_s=rate,
            delay_s=delay_ms / 1000,
            bits_per_s=1e6 * mbit_per_s,
        ),
        thresholds=parse_thresholds(thresholds),
        data_root=data_root,
        append=append,
        plot=plot,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))


@bench.command("labels")
def bench_labels(
    *,
    codecs: Annotated[
        str, typer.Option(help="of gradients; default is that of the settings")
    ] = "default,int2+zstd,fp32",
    rounds: Annotated[int, typer.Option(help="before the one that is attacked", min=1)] = 5,
    batches: Annotated[int, typer.Option(help="of a device in a round", min=1)] = 12,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 8,
    seed: Annotated[int, typer.Option()] = 0,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Infer the labels that devices keep (labels = device) from the gradients that they send."""
    from ops.bench_labels import Scale, run_bench

    rows = run_bench(
        codecs.split(","), Scale(rounds, batches, width, seed), append=append, quiet=as_json
    )
    if as_json:
        print(json.dumps(rows, indent=1))


@bench.command("attacks")
def bench_attacks(
    *,
    attacks: Annotated[
        str, typer.Option(help="none, sign-flip, scale, sign-flip-scale, garbage, labels")
    ] = "none,sign-flip,scale,sign-flip-scale,garbage,labels",
    defences: Annotated[
        str, typer.Option(help="none, clip, trimmed-mean, median, batches, all")
    ] = "none,clip,trimmed-mean,median,batches,all",
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    batches: Annotated[int, typer.Option(help="of a device in a round", min=1)] = 12,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 8,
    partition: Annotated[str, typer.Option(help="iid or dirichlet:ALPHA")] = "iid",
    strategy: Annotated[str, typer.Option(help="averaging, sequential or cascade")] = "averaging",
    seed: Annotated[int, typer.Option()] = 0,
    append: Annotated[Path | None, typer.Option(help="append dated rows to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Let one device of five at each cut attack, and see what each defence takes back."""
    from ops.bench_attacks import Scale, run_bench

    rows = run_bench(
        attacks.split(","),
        defences.split(","),
        Scale(rounds, batches, width, partition, strategy, seed),
        append=append,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(rows, indent=1))

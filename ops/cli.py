"""The command ``splitfleet``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from broker.config import BrokerConfig
from ops import (
    cli_bench,
    cli_device,
    cli_exits,
    cli_experiment,
    cli_flash,
    cli_fleet,
    cli_identity,
    cli_learning,
    cli_model,
    cli_plan,
    cli_predict,
    cli_privacy,
    cli_rollout,
    cli_simulator,
    run,
)
from ops.errors import OpsError, SettingsWrong

app = typer.Typer(
    help="Split learning with early exits for fleets of unequal devices, over MQTT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
broker_app = typer.Typer(help="The MQTT broker: run the embedded one.")
app.add_typer(cli_bench.bench, name="bench")
app.add_typer(broker_app, name="broker")
cli_simulator.register(app, cli_bench.bench)
cli_device.register(app)
cli_experiment.register(app)
cli_exits.register(app)
cli_flash.register(app)
cli_fleet.register(app)
cli_identity.register(app)
cli_model.register(app)
cli_plan.register(app)
cli_predict.register(app)
cli_rollout.register(app)
cli_privacy.register(app)
cli_learning.register(cli_bench.bench)

BrokerUrl = Annotated[str | None, typer.Option("--broker", help="mqtts://HOST:PORT of the broker")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file with the component's section")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="any other setting, key=value; may be repeated")
]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error; default info")]
LogFormat = Annotated[str | None, typer.Option(help="human or json; default human")]
Codec = Annotated[str | None, typer.Option(help="of activations, e.g. int4+zstd")]
GradientCodec = Annotated[
    str | None, typer.Option(help="of gradients; default: four times the levels of the codec")
]
BytesPerSample = Annotated[
    float | None,
    typer.Option(help="budget of activations, and of gradients; codec is the most"),
]
FollowLink = Annotated[
    bool | None, typer.Option(help="fewer levels where sending takes longer than computing")
]
UntilEof = Annotated[bool, typer.Option(hidden=True)]


@app.command()
def demo(
    *,
    agents: Annotated[int | None, typer.Option(help="how many devices")] = None,
    cuts: Annotated[str | None, typer.Option(help="their cut layers, e.g. 2,3,5 or auto")] = None,
    strategy: Annotated[str | None, typer.Option(help="averaging, sequential or cascade")] = None,
    feedback: Annotated[str | None, typer.Option(help="gradient or none")] = None,
    rounds: Annotated[int | None, typer.Option()] = None,
    dataset: Annotated[str | None, typer.Option(help="see docs/cli.md")] = None,
    data_root: Annotated[Path | None, typer.Option(help="where public data sets lie")] = None,
    download: Annotated[bool | None, typer.Option(help="fetch a public data set")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:ALPHA, lists:FILE")] = None,
    width: Annotated[int | None, typer.Option(help="channels of the first stage")] = None,
    codec: Codec = None,
    gradient_codec: GradientCodec = None,
    bytes_per_sample: BytesPerSample = None,
    follow_link: FollowLink = None,
    window: Annotated[int | None, typer.Option(help="batches a device may have out")] = None,
    threshold: Annotated[float | None, typer.Option(help="τ: exit if confidence is above")] = None,
    broker: BrokerUrl = None,
    secure: Annotated[
        bool | None,
        typer.Option("--secure", help="on Mosquitto with certificates, a token and all guards"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the run; an old one is resumed")
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print summary.json, nothing else")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="no progress")] = False,
) -> None:
    """Train a small fleet on this machine, let it answer test images, and write a report."""
    from ops.demo import DemoSettings, run_demo

    given = {
        "agents": agents,
        "cuts": cuts,
        "strategy": strategy,
        "feedback": feedback,
        "rounds": rounds,
        "dataset": dataset,
        "data_root": data_root,
        "download": download,
        "partition": partition,
        "width": width,
        "codec": codec,
        "gradient_codec": gradient_codec,
        "bytes_per_sample": bytes_per_sample,
        "follow_link": follow_link,
        "window": window,
        "threshold": threshold,
        "broker": broker,
        "secure": secure,
        "seed": seed,
    }
    settings = DemoSettings.resolve(out, given)
    run_demo(settings, quiet=quiet or as_json, as_json=as_json)


@app.command()
def coordinator(
    *,
    broker: BrokerUrl = None,
    fleet: Annotated[str | None, typer.Option()] = None,
    state_dir: Annotated[Path | None, typer.Option(help="where runs and checkpoints live")] = None,
    dataset: Annotated[str | None, typer.Option(help="to score checkpoints on")] = None,
    data_root: Annotated[Path | None, typer.Option()] = None,
    download: Annotated[bool | None, typer.Option(help="fetch a public data set")] = None,
    network: Annotated[str | None, typer.Option(help="resnet18 or package.module:function")] = None,
    width: Annotated[int | None, typer.Option()] = None,
    strategy: Annotated[str | None, typer.Option(help="averaging, sequential or cascade")] = None,
    feedback: Annotated[str | None, typer.Option(help="gradient or none")] = None,
    rounds: Annotated[int | None, typer.Option()] = None,
    codec: Codec = None,
    gradient_codec: GradientCodec = None,
    bytes_per_sample: BytesPerSample = None,
    follow_link: FollowLink = None,
    window: Annotated[int | None, typer.Option()] = None,
    min_devices: Annotated[int | None, typer.Option(help="before the first round starts")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="serve /metrics here")] = None,
    metrics_host: Annotated[str | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    fresh: Annotated[bool, typer.Option(help="start a new run instead of resuming")] = False,
    stay: Annotated[bool | None, typer.Option(help="go on answering after the run")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    quiet: Annotated[bool, typer.Option(help="no progress")] = False,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    until_eof: UntilEof = False,
) -> None:
    """Run the coordinator: it trains with the fleet for the given rounds, then ends."""
    from ops.services import serve_coordinator

    given = {
        "fleet": fleet,
        "state_dir": state_dir,
        "dataset": dataset,
        "data_root": data_root,
        "download": download,
        "strategy": strategy,
        "feedback": feedback,
        "rounds": rounds,
        "codec": codec,
        "gradient_codec": gradient_codec,
        "bytes_per_sample": bytes_per_sample,
        "follow_link": follow_link,
        "window": window,
        "min_devices": min_devices,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
        "seed": seed,
        "stay": stay,
        "log_level": log_level,
        "log_format": log_format,
    }
    serve_coordinator(
        run.with_assignments(assignments or [], given),
        {"name": network, "width": width},
        {"url": broker},
        config,
        fresh=fresh,
        quiet=quiet,
        until_eof=until_eof,
    )


@app.command()
def agent(
    *,
    device: Annotated[str | None, typer.Option(help="this device's name")] = None,
    broker: BrokerUrl = None,
    fleet: Annotated[str | None, typer.Option()] = None,
    cut: Annotated[str | None, typer.Option(help="cut layer, or auto")] = None,
    dataset: Annotated[str | None, typer.Option()] = None,
    data_root: Annotated[Path | None, typer.Option()] = None,
    download: Annotated[bool | None, typer.Option(help="fetch a public data set")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    share: Annotated[
        int | None, typer.Option(help="this device's part of the data, from 0")
    ] = None,
    shares: Annotated[int | None, typer.Option(help="into how many parts it is split")] = None,
    state_dir: Annotated[Path | None, typer.Option()] = None,
    lite: Annotated[
        bool, typer.Option("--lite", help="without torch: engine = onnxruntime, see docs/method.md")
    ] = False,
    threads: Annotated[int | None, typer.Option()] = None,
    exit_when_finished: Annotated[bool | None, typer.Option()] = None,
    http: Annotated[
        str | None, typer.Option(help="answer pictures over HTTP at HOST:PORT, see docs")
    ] = None,
    http_token_file: Annotated[
        Path | None, typer.Option(help="the token clients must show; needed beyond this machine")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="serve its own counts here")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    until_eof: UntilEof = False,
) -> None:
    """Run one device's agent."""
    from ops.services import serve_agent

    given = {
        "device": device,
        "fleet": fleet,
        "cut": int(cut) if cut is not None and cut.isdecimal() else cut,
        "dataset": dataset,
        "data_root": data_root,
        "download": download,
        "partition": partition,
        "share": share,
        "shares": shares,
        "state_dir": state_dir,
        "engine": "onnxruntime" if lite else None,
        "threads": threads,
        "exit_when_finished": exit_when_finished,
        "http": http,
        "http_token_file": http_token_file,
        "log_level": log_level,
        "log_format": log_format,
        "metrics_port": metrics_port,
    }
    flags = run.with_assignments(assignments or [], given)
    serve_agent(flags, {"url": broker}, config, until_eof=until_eof)


@broker_app.callback(invoke_without_command=True)
def broker_run(
    context: typer.Context,
    *,
    port: Annotated[int, typer.Option(help="on the loopback interface; 0 takes a free one")] = 1883,
    until_eof: UntilEof = False,
) -> None:
    """Run the embedded broker: for demos and development, not for a fleet."""
    if context.invoked_subcommand is None:
        from ops.services import serve_broker

        serve_broker(port, until_eof=until_eof)


@app.command()
def doctor(
    *,
    broker: BrokerUrl = None,
    dataset: Annotated[str | None, typer.Option()] = None,
    data_root: Annotated[Path | None, typer.Option()] = None,
    state_dir: Annotated[Path | None, typer.Option()] = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Check this machine, the broker and the data, and say what to do about each failure.

    What is not given is taken from the section [coordinator] of --config, or else from [agent].
    """
    from ops.doctor import Subject, examine, show, with_identity

    config_of_broker = None
    if broker is not None or config is not None:
        config_of_broker = run.settings_of(BrokerConfig, "broker", config, {"url": broker})
        config_of_broker = with_identity(config_of_broker, config)
    flags = {"dataset": dataset, "data_root": data_root, "state_dir": state_dir}
    subject = Subject.resolve(config, flags)
    findings = asyncio.run(examine(config_of_broker, **dict(subject)))
    show(findings, as_json=as_json)
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> Any:
    """The console script: every error one line, every kind of error its exit code."""
    try:
        with run.plain_errors():
            code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Abort:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OpsError as exc:
        print(f"splitfleet: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except Exception as exc:
        if not _is_usage_error(exc):
            raise
        exc.show()  # type: ignore[attr-defined]
        sys.exit(SettingsWrong.exit_code)


def _is_usage_error(exc: Exception) -> bool:
    # typer vendors click's exceptions or imports them, depending on its version.
    return any(kind.__name__ == "ClickException" for kind in type(exc).__mro__)


if __name__ == "__main__":
    main()

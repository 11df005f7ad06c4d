"""The command ``splitfleet predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops import run

if TYPE_CHECKING:
    from ops.predict import Ask


def register(app: typer.Typer) -> None:
    """Add it to the command line."""
    app.command()(predict)


def predict(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files")],
    *,
    model: Annotated[
        Path | None, typer.Option(help="a file of splitfleet model export: all is computed here")
    ] = None,
    agent: Annotated[
        str | None, typer.Option(help="a device that serves HTTP: NAME, HOST:PORT or URL")
    ] = None,
    cut: Annotated[
        int | None, typer.Option(help="with --model: which exit; default: the shallowest")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="with --model: τ; default: that of the file")
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(help="with --model: a factory package.module:function it may name"),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="with --agent: that of its --http-token-file")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option(help="with --agent: for each picture; default 30")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="classes shown for each")] = 3,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with [predict]: where agents are")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Say what is in pictures, who said so, and how long it took."""
    from ops import predict as predicting
    from ops.errors import SettingsWrong

    if (model is None) == (agent is None):
        raise SettingsWrong("say who answers: --model FILE or --agent NAME, one of them")
    if model is not None:
        if token_file is not None or timeout_s is not None:
            raise SettingsWrong("--token-file and --timeout-s belong to --agent, not to --model")
        ask = _local(model, cut, threshold, network or [], top)
    else:
        assert agent is not None
        if cut is not None or threshold is not None or network:
            raise SettingsWrong("--cut, --threshold and --network belong to --model, not --agent")
        ask = _remote(agent, token_file, timeout_s, config, top)
    predicting.predict(images, ask, as_json=as_json)


def _local(
    path: Path, cut: int | None, threshold: float | None, factories: list[str], top: int
) -> Ask:
    from ops.errors import SettingsWrong
    from ops.model_file import read_model
    from ops.predict import Local

    if threshold is not None and not 0 <= threshold <= 1:
        raise SettingsWrong(f"--threshold {threshold:g}: confidence lies between 0 and 1")
    found = read_model(path, factories=factories)
    if cut is None and not found.card.cuts:
        return Local(found, None, 1.0, top)
    cut, card = found.card.cut_card(min(found.card.cuts) if cut is None else cut)
    return Local(found, cut, card.threshold if threshold is None else threshold, top)


def _remote(
    name: str, token_file: Path | None, timeout_s: float | None, config: Path | None, top: int
) -> Ask:
    from edge_agent.http_server import read_token
    from ops.predict_agent import Agent, PredictSettings, find_agent

    settings = run.settings_of(PredictSettings, "predict", config, {"timeout_s": timeout_s})
    token = None if token_file is None else read_token(token_file)
    return Agent(find_agent(name, settings.agents), top, settings.timeout_s, token)

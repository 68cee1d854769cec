"""`internvl-edge serve BUNDLE`: answer over HTTP, in the form of OpenAI's interface."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import require_extras
from internvl_edge.base.progress import note
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.preprocess import MAX_TILES, require_color
from internvl_edge.runtime.find import find_bundle

from .options import LOADING_NAMES, engine_extra, image_options, load_model, loading_options
from .output import quiet_option, shown_progress

_KEY_VARIABLE = "INTERNVL_EDGE_API_KEY"


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all networks.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=23333, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"File with one API key per line; clients need one of them. {_KEY_VARIABLE} can hold one, too.",
)
@click.option("--no-auth", is_flag=True, help="Listen on a network without any API key.")
@click.option("--rows", type=click.IntRange(1, 64), default=4, show_default=True, help="Answers computed together.")
@click.option(
    "--queue", type=click.IntRange(min=0), default=32, show_default=True, help="Requests that may wait beyond these."
)
@click.option(
    "--max-tiles",
    type=click.IntRange(1, MAX_TILES),
    default=6,
    show_default=True,
    help='Maximum number of tiles of an image whose "detail" is "auto".',
)
@image_options
@click.option("--max-samples", type=click.IntRange(1, 64), default=8, show_default=True, help="Maximum of n and votes.")
@click.option("--name", help="Name of the model in the interface.  [default: the name of the folder]")
@click.option(
    "--request-timeout", type=click.FloatRange(min=1), default=300, show_default=True, help="Seconds for a request."
)
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    default=25,
    show_default=True,
    help="Seconds that answers under way have after SIGTERM.",
)
@click.option(
    "--cors-origin", "cors_origins", multiple=True, help="Origin whose pages may call this server (repeatable)."
)
@click.option(
    "--allow-image-host",
    "image_hosts",
    multiple=True,
    metavar="HOST",
    help="Host, or HOST:PORT, whose public http(s) images may be fetched (repeatable).  [default: none]",
)
@click.option("--open-metrics", is_flag=True, help="Serve /metrics without an API key.")
@click.option("--strict-fields", is_flag=True, help="Refuse fields that this server does not know.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain in PEM; with --tls-key.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Private key in PEM.")
@click.option("--no-access-log", is_flag=True, help="Write no line per request to standard output.")
@quiet_option
@loading_options
def command(
    bundle: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    no_auth: bool,
    no_access_log: bool,
    quiet: bool,
    tls_cert: Path | None,
    tls_key: Path | None,
    **values: Any,
) -> None:
    """Answer questions about images over HTTP, in the form of OpenAI's interface.

    Clients take http://HOST:PORT/v1 as base URL. Requests are logged to standard output, one line of JSON each, without
    prompts, images or answers. SIGTERM lets answers under way end.
    """
    require_extras("serve", "serve", *engine_extra(bundle, values["device"], values["engine"]))
    from internvl_edge.server.access import read_keys
    from internvl_edge.server.run import EdgeServer, Place, is_loopback

    keys = read_keys(api_key_file, os.environ.get(_KEY_VARIABLE))
    if not (keys or no_auth or is_loopback(host)):
        raise EdgeError(
            f"--host {host} can be reached by others and there is no API key; give --api-key-file, or --no-auth to let "
            "everybody ask"
        )
    if (tls_cert is None) != (tls_key is None):
        raise EdgeError("--tls-cert and --tls-key belong together; give both or none")
    if values["background"] is not None:
        require_color(values["background"])
    values["name"] = values["name"] or (bundle.resolve() if bundle.exists() else bundle).name
    bundle = find_bundle(bundle, values.pop("revision"), values["device"])
    Bundle.open(bundle)  # a mistake shows before the port is taken
    settings = _settings(keys, is_loopback(host) and not keys and not no_auth, values)
    loading = {"revision": None, **{name: values[name] for name in LOADING_NAMES if name != "revision"}}

    def load() -> Any:
        waiting = (settings.rows + settings.limits.queue) * settings.limits.samples
        with shown_progress(quiet) as progress:
            progress.expect(1)
            return load_model(bundle, dict(loading), progress, rows=settings.rows, most_waiting=waiting)

    server = EdgeServer(
        settings,
        load,
        bundle,
        Place(host, port, tls_cert, tls_key),
        access_log=None if no_access_log else sys.stdout,
        ready=lambda address: note(f"internvl-edge: {settings.model} answers at {address}/v1"),
    )
    server.run()


def _settings(keys: tuple[str, ...], local_names: bool, values: dict[str, Any]) -> Any:
    from internvl_edge.server.settings import Limits, Settings

    limits = partial(Limits, samples=values["max_samples"], queue=values["queue"])
    return Settings(
        model=values["name"],
        rows=values["rows"],
        max_tiles=values["max_tiles"],
        exif=values["exif"],
        background=values["background"],
        keys=keys,
        local_names=local_names,
        cors_origins=values["cors_origins"],
        image_hosts=values["image_hosts"],
        open_metrics=values["open_metrics"],
        strict_fields=values["strict_fields"],
        drain_s=values["drain"],
        limits=limits(request_s=values["request_timeout"]),
    )

"""`internvl-edge push BUNDLE|CHECKPOINT REPO`: put a bundle or a quantized checkpoint on the hub, with a card."""

from __future__ import annotations

from pathlib import Path

import click

from internvl_edge.base.extras import require_extras
from internvl_edge.base.units import size
from internvl_edge.publishing.push import push

from .output import hint, print_json, quiet_option, shown_progress, stoppable


@click.command("push")
@click.argument("folder", metavar="PATH", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--revision", help="Branch to push to; it is made if it is missing.  [default: main]")
@click.option("--private", is_flag=True, help="Make a new repository private, and refuse one that is public.")
@click.option("-m", "--message", default="", help="Message of the commit.  [default: what is uploaded]")
@click.option("--engines", is_flag=True, help="Upload the TensorRT engines of a bundle too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
@stoppable("repeat the command to continue; large files that arrived are not sent again")
def command(
    folder: Path,
    repo: str,
    revision: str | None,
    private: bool,
    message: str,
    engines: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Put PATH, a bundle or a checkpoint that quantize made, into REPO on the hub (OWNER/NAME), with a model card.

    The repository is made if it is missing. A stopped upload continues when the command is repeated. The token is that
    of the hub's client: HF_TOKEN, or hf auth login.
    """
    require_extras("push", "hub")
    with shown_progress(quiet) as progress:
        done = push(
            folder,
            repo,
            revision=revision,
            private=private,
            message=message,
            engines=engines,
            progress=progress,
        )
    if as_json:
        print_json(done)
        return
    what = f"{done.files} files, {size(done.bytes)}, commit {done.commit}"
    click.echo(f"{done.repository}: {what}{'' if done.changed else '; nothing changed'}")
    if done.removed:
        click.echo(f"removed from the repository: {', '.join(done.removed)}")
    if quiet:
        return
    pinned = (done.repository, "--revision", done.commit)
    if done.kind == "bundle":
        hint("run", *pinned, "--image", "PHOTO.jpg", "What is this?")
    else:
        hint("export", *pinned, "-o", "BUNDLE")

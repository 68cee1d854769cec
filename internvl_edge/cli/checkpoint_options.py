"""The option of every command that takes a checkpoint or a bundle: which version of it, where it is on the hub."""

from __future__ import annotations

import click

revision_option = click.option("--revision", help="Branch, tag or commit of a hub id.  [default: main]")

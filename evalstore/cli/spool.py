"""`evalstore spool`: what this machine's senders kept while Redis was away, and sending it on."""

import signal
import time
from typing import Annotated

import typer

from evalstore.cli.output import Format, OutputOption, failed, notice, show
from models.errors import InvalidSettings, Outage
from tasks.broker import broker
from tasks.spool import Spool

app = typer.Typer(
    help="Events that senders on this machine keep while Redis is away: the folder EVALSTORE_SPOOL_DIR.", no_args_is_help=True
)
_PAUSE_S = 0.5


@app.command()
def status(output_format: OutputOption = Format.table) -> None:
    """Show what waits to be sent on. Needs no server."""
    held = _spool().status()
    columns = ["messages", "bytes", "oldest_age_s", "damaged"]
    rounded = None if held.oldest_age_s is None else round(held.oldest_age_s, 1)
    show([held._asdict() | {"oldest_age_s": rounded}], columns, output_format)


@app.command()
def forward(
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C, through outages, as a service.")] = False,
) -> None:
    """Send on what waits, in order. Senders that live on do so by themselves.

    Exit status 4 if some lines were damaged; their file is kept.
    """
    spool = _spool()
    if watch:
        _forward_on(spool)
        return
    try:
        sent, damaged = spool.forward(broker().send_on)
    except OSError as error:
        raise failed(f"{spool.folder} cannot be read: {error.strerror}", 1) from None
    if damaged:
        raise failed(f"{sent:,} sent on; {damaged:,} damaged lines kept in {spool.folder}/*.bad", 4)
    notice(f"{sent:,} sent on", "green")


def _forward_on(spool: Spool) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failing = False
    try:
        while True:
            try:
                sent, damaged = spool.forward(broker().send_on)
            except (Outage, OSError) as error:
                if not failing:
                    notice(f"waiting: {error}", "yellow")
                failing = True
            else:
                failing = False
                if damaged:
                    notice(f"{damaged:,} damaged lines kept in {spool.folder}/*.bad", "red")
                if sent:
                    notice(f"{sent:,} sent on", "green")
            time.sleep(_PAUSE_S)
    except KeyboardInterrupt:
        return


def _spool() -> Spool:
    spool = broker().spool
    if spool is None:
        raise InvalidSettings("EVALSTORE_SPOOL_DIR: not set, so there is no spool")
    return spool

"""`evalstore spool`: show and forward events that senders on this machine saved during an outage of Redis."""

import signal
import time
from typing import Annotated

import typer

from evalstore.cli.output import Format, OutputOption, failed, notice, show
from models.errors import InvalidSettings, Outage
from tasks.broker import broker
from tasks.spool import Spool

app = typer.Typer(
    help="Events that senders on this machine keep during an outage of Redis, in the folder EVALSTORE_SPOOL_DIR.",
    no_args_is_help=True,
)
_INTERVAL_S = 0.5


@app.command()
def status(output_format: OutputOption = Format.table) -> None:
    """Show the events that wait to be forwarded. Needs no server."""
    spooled = _spool().status()
    columns = ["messages", "bytes", "oldest_age_s", "damaged"]
    rounded = None if spooled.oldest_age_s is None else round(spooled.oldest_age_s, 1)
    show([spooled._asdict() | {"oldest_age_s": rounded}], columns, output_format)


@app.command()
def forward(
    watch: Annotated[bool, typer.Option("--watch", help="Run until Ctrl-C, also through outages, as a service.")] = False,
) -> None:
    """Send the waiting events in order. Running senders do this by themselves.

    Exit status 4 if some lines were damaged. Their file is kept.
    """
    spool = _spool()
    if watch:
        _forward_forever(spool)
        return
    try:
        sent, damaged = spool.forward(broker().send_spooled)
    except OSError as error:
        raise failed(f"{spool.folder} cannot be read: {error.strerror}", 1) from None
    if damaged:
        raise failed(f"{sent:,} forwarded; {damaged:,} damaged lines kept in {spool.folder}/*.bad", 4)
    notice(f"{sent:,} forwarded", "green")


def _forward_forever(spool: Spool) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failing = False
    try:
        while True:
            try:
                sent, damaged = spool.forward(broker().send_spooled)
            except (Outage, OSError) as error:
                if not failing:
                    notice(f"waiting: {error}", "yellow")
                failing = True
            else:
                failing = False
                if damaged:
                    notice(f"{damaged:,} damaged lines kept in {spool.folder}/*.bad", "red")
                if sent:
                    notice(f"{sent:,} forwarded", "green")
            time.sleep(_INTERVAL_S)
    except KeyboardInterrupt:
        return


def _spool() -> Spool:
    spool = broker().spool
    if spool is None:
        raise InvalidSettings("EVALSTORE_SPOOL_DIR: not set, so there is no spool")
    return spool

"""The problems that an operator has to know of: each a sentence, with the page that repairs it and its runbook section."""

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

from evalstore.console.rendering import duration
from models.jobs import JOBS
from tasks.keys import QUEUE

QUEUES: Final = "/console/queues"
DEAD_LETTERS: Final = "/console/dead-letters"
SCHEDULE: Final = "/console/schedule"
ARCHIVE: Final = "/console/archive"
SINKS: Final = "/console/sinks"
WEBHOOKS: Final = "/console/webhooks"

# The limits of the alert rules in deploy/prometheus/rules.yml.
_OLD_S: Final = 60.0
_CONFIRMATIONS_S: Final = 60.0
_SINK_S: Final = 300.0
_WEBHOOK_S: Final = 600.0
_ARCHIVE_S: Final = 21_600.0
_PERIODS: Final = 3


class Attention(NamedTuple):
    """A problem. `page` repairs it, None if no page can. `runbook` is a section of the runbook."""

    level: Literal["bad", "warn"]
    text: str
    page: str | None
    runbook: str


def of(snapshot: Mapping[str, Any]) -> list[Attention]:
    """Return the problems in a snapshot of `StatusProbe`, the worst first."""
    found = [*_servers(snapshot), *_queues(snapshot), *_letters(snapshot), *_passing_on(snapshot), *_keeping(snapshot)]
    return sorted([*found, *_jobs(snapshot)], key=lambda each: each.level != "bad")


def _servers(snapshot: Mapping[str, Any]) -> Iterator[Attention]:
    names = {"redis": "Redis", "postgresql": "PostgreSQL"}
    for name, error in snapshot["errors"].items():
        if name == "schema":
            yield Attention("bad", f"The tables are of another release: {error}", None, "evalstoreschemamismatch")
        else:
            text = f"{names[name]} cannot be used: {error}. Nothing is lost; events wait until it is back."
            yield Attention("bad", text, None, "evalstoreoutage")
    if outages := snapshot.get("outages"):
        yield Attention("bad", f"Workers wait for {', '.join(outages)}.", QUEUES, "evalstoreoutage")
    for doubt in snapshot["doubts"]:
        yield Attention("warn", f"PostgreSQL is not set up to keep what it commits: {doubt}", None, "evalstoreoutage")


def _queues(snapshot: Mapping[str, Any]) -> Iterator[Attention]:
    if snapshot.get("breaker_open"):
        count = snapshot["breaker_open"]
        text = f"{count:,} worker processes stopped consuming, because most messages are bad."
        yield Attention("bad", text, DEAD_LETTERS, "evalstorebreakeropen")
    for queue in snapshot.get("queues", ()):
        waiting = queue["ready"] + queue["inflight"] + queue["delayed"]
        if not queue["consumers"]:
            text = f"No worker consumes the queue {queue['queue']}; {waiting:,} messages wait."
            yield Attention("bad", text, QUEUES, "evalstorenoworkers")
        if queue["oldest_age_s"] > _OLD_S:
            text = f"The oldest message of the queue {queue['queue']} has waited for {duration(queue['oldest_age_s'])}."
            yield Attention("bad", text, QUEUES, "evalstorequeueold")
        if queue["queue"] == QUEUE and queue["delayed"]:
            yield Attention("warn", f"{queue['delayed']:,} events wait for objects.", QUEUES, "evalstoreobjectsawaited")


def _letters(snapshot: Mapping[str, Any]) -> Iterator[Attention]:
    letters = snapshot.get("dead_letters")
    if letters and letters["count"]:
        text = f"{letters['count']:,} dead letters in {len(letters['groups']):,} groups wait for an operator."
        yield Attention("bad", text, DEAD_LETTERS, "evalstoredeadletters")


def _passing_on(snapshot: Mapping[str, Any]) -> Iterator[Attention]:
    confirmations = snapshot.get("confirmations")
    if confirmations and confirmations["oldest_age_s"] > _CONFIRMATIONS_S:
        text = f"{confirmations['pending']:,} confirmations are not published, the oldest for "
        yield Attention("bad", f"{text}{duration(confirmations['oldest_age_s'])}.", SCHEDULE, "evalstoreconfirmationslate")
    for sink in snapshot.get("sinks", ()):
        if not sink["running"]:
            text = f"The sink {sink['sink']} is paused, {sink['lag_events']:,} events behind."
            yield Attention("warn", text, SINKS, "evalstoresinklate")
        elif sink["failing_s"]:
            text = f"The sink {sink['sink']} has been failing for {duration(sink['failing_s'])}."
            yield Attention("bad", text, SINKS, "evalstoresinklate")
        elif sink["lag_s"] > _SINK_S:
            yield Attention("bad", f"The sink {sink['sink']} is late by {duration(sink['lag_s'])}.", SINKS, "evalstoresinklate")
    outbox = snapshot.get("outbox")
    if outbox and outbox["age_s"] > 0.7 * outbox["limit_s"]:
        text = f"The slowest sink is behind by {duration(outbox['age_s'])}, and is about to lose rows of the outbox."
        yield Attention("bad", text, SINKS, "evalstoreoutboxold")
    webhooks = snapshot.get("webhooks", {"disabled": 0, "oldest_due_s": 0})
    if webhooks["disabled"]:
        text = f"{webhooks['disabled']:,} webhooks are disabled: their receivers get nothing."
        yield Attention("warn", text, WEBHOOKS, "evalstorewebhookdisabled")
    if webhooks["oldest_due_s"] > _WEBHOOK_S:
        text = f"A webhook delivery has waited for {duration(webhooks['oldest_due_s'])}."
        yield Attention("bad", text, WEBHOOKS, "evalstorewebhookslate")


def _keeping(snapshot: Mapping[str, Any]) -> Iterator[Attention]:
    archive = snapshot.get("archive")
    if archive and archive["failing"]:
        text = f"{archive['failing']:,.0f} contents cannot be moved to the archive."
        yield Attention("bad", text, ARCHIVE, "evalstorearchivefailing")
    if archive and archive["oldest_due_age_s"] > _ARCHIVE_S:
        text = f"The archive is behind: content has been due for {duration(archive['oldest_due_age_s'])}."
        yield Attention("bad", text, ARCHIVE, "evalstorearchivelate")


def _jobs(snapshot: Mapping[str, Any]) -> Iterator[Attention]:
    jobs = snapshot.get("jobs", ())
    if jobs and not any(job["last_run"] for job in jobs):
        yield Attention("bad", "No scheduler runs: no periodic job has ever been started.", SCHEDULE, "evalstorenoscheduler")
        return
    periods = {job.name: timedelta(minutes=30 if "/30" in job.schedule else 1) for job in JOBS}
    for job in jobs:
        name, succeeded_at = job["job"].replace("_", " "), job["last_success"]
        if job["outcome"] == "failed":
            yield Attention("bad", f"The job “{name}” failed: {job['error']}", SCHEDULE, "evalstorejoboverdue")
        elif isinstance(succeeded_at, datetime) and snapshot["at"] - succeeded_at > _PERIODS * periods[job["job"]]:
            since = duration((snapshot["at"] - succeeded_at).total_seconds())
            yield Attention("bad", f"The job “{name}” has not succeeded for {since}.", SCHEDULE, "evalstorejoboverdue")

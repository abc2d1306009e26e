"""Make the table in docs/performance.md from a run's results: `python -m bench.report RESULTS.json`."""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

BEGIN: Final = "<!-- made by bench/report.py: begin -->"
END: Final = "<!-- made by bench/report.py: end -->"
_PEERS: Final = ("celery", "rq", "arq", "taskiq", "saq")


def table(results: dict[str, Any]) -> str:
    """Format all results of a run as Markdown."""
    parts = [_machine(results), _rates(results), _aims(results), _latency(results), _send(results), _more(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(page: Path, text: str) -> None:
    """Put `text` between the page's markers. Raises ValueError if the page has no markers."""
    old = page.read_text(encoding="utf-8")
    before, after = old[: old.index(BEGIN) + len(BEGIN)], old[old.index(END) :]
    page.write_text(f"{before}\n\n{text}\n{after}", encoding="utf-8")


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    libraries = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items())
    note = " A smoke run: its numbers mean nothing." if results.get("quick") else ""
    return (
        f"Run of {results['date'][:10]}, {results['minutes']} minutes.{note} {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}, {machine['file_system']} (8 KiB durable in "
        f"{machine['fsync_ms']} ms), load before: {machine['load_before']}. Python {machine['python']}, "
        f"PostgreSQL {machine['postgresql']}, Valkey {machine['valkey']}; {libraries}."
    )


def _medians(results: dict[str, Any]) -> dict[str, float]:
    return {
        name: statistics.median(round_["events_per_s"] for round_ in each) for name, each in results.get("rate", {}).items()
    }


def _cpu_us(each: list[dict[str, Any]]) -> float:
    return float(statistics.median(sum(round_["cpu_us"].values()) for round_ in each))


def _rates(results: dict[str, Any]) -> str:
    medians = _medians(results)
    rows = []
    for name, per_s in medians.items():
        each = results["rate"][name]
        cpu = [f"{statistics.median(round_['cpu_us'][part] for round_ in each):,.0f}" for part in each[0]["cpu_us"]]
        of = f"{medians['evalstore'] / per_s:.2f}" if "evalstore" in medians else ""
        spent = f"{_cpu_us(each) / _cpu_us(results['rate']['evalstore']):.2f}" if "evalstore" in medians else ""
        spread = (
            f"{min(round_['events_per_s'] for round_ in each):,.0f} to {max(round_['events_per_s'] for round_ in each):,.0f}"
        )
        complaints = "; ".join(sorted({round_["complaint"] for round_ in each if round_["complaint"]}))
        rows.append([results["titles"][name], results["shapes"][name], f"{per_s:,.0f}", spread, of, *cpu, spent, complaints])
    if not rows:
        return ""
    head = ["side", "processes, threads", "events/s", "rounds", "evalstore ÷ this"]
    head += ["µs: workers", "PostgreSQL", "Valkey", "all ÷ evalstore's", ""]
    return f"Events stored a second from a full queue, and processor time for each event:\n\n{_markdown(head, rows)}"


class _Aim(NamedTuple):
    what: str
    wanted: str
    got: float
    is_met: bool
    form: str = "{:.2f}"


def _aims(results: dict[str, Any]) -> str:
    aims = [*_rate_aims(results), *_latency_aims(results), *_send_aims(results), *_memory_aims(results), *_stored_aims(results)]
    rows = [[aim.what, aim.wanted, aim.form.format(aim.got), "yes" if aim.is_met else "no"] for aim in aims]
    return f"The aims:\n\n{_markdown(['what', 'aim', 'measured', 'met'], rows)}" if rows else ""


def _rate_aims(results: dict[str, Any]) -> Iterator[_Aim]:
    medians = _medians(results)
    best = max((medians[name] for name in _PEERS if name in medians), default=None)
    others = [
        ("(b)", medians.get("stock"), 20.0),
        ("(c)", medians.get("nothing"), 4.0),
        ("the best of (d) to (f)", best, 25.0),
        ("(g)", medians.get("stream"), 1.5),
        ("(h)", medians.get("floor"), 0.85),
    ]
    for title, other, wanted in others:
        if other and "evalstore" in medians:
            ratio = medians["evalstore"] / other
            yield _Aim(f"rate ÷ that of {title}", f"≥ {wanted:g}", ratio, ratio >= wanted)


def _latency_aims(results: dict[str, Any]) -> Iterator[_Aim]:
    if measured := results.get("latency", {}).get("evalstore"):
        for part, wanted in (("p50_ms", 5), ("p99_ms", 25)):
            ms = measured["idle"][part]
            yield _Aim(f"idle latency, {part[:3]}, ms", f"< {wanted}", ms, ms < wanted, "{:.1f}")


def _send_aims(results: dict[str, Any]) -> Iterator[_Aim]:
    if send := results.get("send"):
        for part, name in (("cpu_us", "CPU"), ("wall_us", "wall")):
            single, many = send["evalstore"][part] / send["stock"][part], send["stock"][part] / send["bulk"][part]
            yield _Aim(f"`send` ÷ stock, {name}", "≤ 1", single, single <= 1)
            yield _Aim(f"stock `send` ÷ bulk send, {name}", "≥ 8", many, many >= 8)


def _memory_aims(results: dict[str, Any]) -> Iterator[_Aim]:
    if memory := results.get("memory"):
        growth = memory["last_fifth_mib"] / memory["second_fifth_mib"]
        yield _Aim("memory of a worker process, MiB", "< 200", memory["peak_mib"], memory["peak_mib"] < 200, "{:.0f}")
        yield _Aim("… at the end ÷ at the beginning", "flat", growth, growth < 1.1)


def _stored_aims(results: dict[str, Any]) -> Iterator[_Aim]:
    stored = {(round_["before"], round_["ordered"]): round_["events_per_s"] for round_ in results.get("stored", [])}
    most = max((before for before, _ in stored), default=0)
    for ordered, ids in ((False, "random"), (True, "ascending")):
        if most and stored.get((0, ordered)):
            ratio = stored[most, ordered] / stored[0, ordered]
            yield _Aim(f"rate with {most:,} stored ÷ empty, {ids} ids", "≥ 0.8", ratio, ratio >= 0.8)


def _latency(results: dict[str, Any]) -> str:
    rows = [
        [results["titles"][name], when, *(f"{of[part]:,.1f}" for part in ("p50_ms", "p99_ms", "worst_ms")), str(of["probes"])]
        for name, both in results.get("latency", {}).items()
        if both
        for when, of in (("idle", both["idle"]), (f"{both['loaded']['sent_per_s']:,.0f} events/s", both["loaded"]))
    ]
    head = ["side", "when", "p50 ms", "p99 ms", "worst", "events looked at"]
    return f"From `send` to committed and visible:\n\n{_markdown(head, rows)}" if rows else ""


def _send(results: dict[str, Any]) -> str:
    names = {"stock": "stock `send`", "evalstore": "`store_evaluation.send`", "bulk": "`store_evaluations`, 1,000 together"}
    rows = [
        [names[name], f"{result['cpu_us']:.0f}", f"{result['wall_us']:.0f}"] for name, result in results.get("send", {}).items()
    ]
    return f"What an event costs its sender:\n\n{_markdown(['', 'CPU µs', 'wall µs'], rows)}" if rows else ""


def _more(results: dict[str, Any]) -> str:
    rows = [[f"{number} processes", f"{per_s:,.0f}"] for number, per_s in results.get("processes", {}).items()]
    rows += [
        [
            f"{result['before']:,} evaluations, {'ascending' if result['ordered'] else 'random'} ids {result['complaint']}",
            f"{result['events_per_s']:,.0f}",
        ]
        for result in results.get("stored", [])
    ]
    if memory := results.get("memory"):
        rows.append([f"one queue of {memory['events']:,} events {memory['complaint']}", f"{memory['events_per_s']:,.0f}"])
    rows += [*_turns("traces", results.get("tracing", {})), *_turns("metrics and logs", results.get("watching", {}))]
    return f"evalstore in other situations:\n\n{_markdown(['', 'events/s'], rows)}" if rows else ""


def _turns(what: str, cases: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """Format each case with its cost relative to the case `off`: the median over rounds, each of which ran all cases."""
    for name, each in cases.items():
        text = f"{what} {name}; {_cpu_us(each):.1f} µs of processor time an event"
        if name != "off":
            pairs = list(zip(cases["off"], each, strict=True))
            rate = statistics.median(1 - round_["events_per_s"] / off["events_per_s"] for off, round_ in pairs)
            cpu = statistics.median(_cpu_us([round_]) / _cpu_us([off]) - 1 for off, round_ in pairs)
            text += f"; by rounds {rate:.1%} fewer events/s, {cpu:.1%} more processor time"
        yield [text, f"{statistics.median(round_['events_per_s'] for round_ in each):,.0f}"]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    found_before = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write(Path(__file__).parents[1] / "docs/performance.md", table(found_before))

"""The console's routes, in the order of its navigation. A new module of pages is a line in MODULES."""

from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from evalstore.console import (
    anomalies,
    archive,
    audit,
    dead_letters,
    evaluation,
    evaluations,
    keys,
    operations,
    overview,
    redrives,
    runbook,
    runs,
    sign_in,
    sinks,
    static,
    webhooks,
)
from evalstore.console.pages import answering
from models.settings import Settings

MODULES: Final = (
    *(overview, evaluations, evaluation, runs, dead_letters, redrives, operations, archive, sinks, webhooks, anomalies),
    *(keys, audit, runbook),
)


async def _to_overview(request: Request) -> Response:  # noqa: ARG001 - Starlette's signature
    return RedirectResponse("/console", 303)


async def favicon(request: Request) -> Response:
    """Answer `GET /favicon.ico`, which browsers ask for."""
    request.path_params["name"] = "favicon.svg"
    return await static.serve(request)


def _fixed() -> list[Route]:
    return [
        Route("/console/", answering(_to_overview), methods=["GET"]),
        Route(sign_in.LOGIN, answering(sign_in.show), methods=["GET"]),
        Route(sign_in.LOGIN, answering(sign_in.sign_in), methods=["POST"]),
        Route("/console/logout", answering(sign_in.sign_out), methods=["POST"]),
        Route("/console/static/{name}", answering(static.serve), methods=["GET"]),
        Route("/favicon.ico", answering(favicon), methods=["GET"]),
    ]


def routes(settings: Settings) -> list[Route]:
    """Return all routes; none if the console is off."""
    if settings.console == "off":
        return []
    return [*_fixed(), *(route for module in MODULES for route in module.pages.routes)]


def mount(app: FastAPI, settings: Settings) -> None:
    """Add the console to the service, unless it is off."""
    app.state.console_entries = [entry for module in MODULES for entry in module.pages.entries]
    app.router.routes.extend(routes(settings))


def close(app: FastAPI) -> None:
    """Close what the pages opened."""
    overview.close(app)

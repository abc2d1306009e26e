"""The caller of a request, as a FastAPI dependency that checks the key."""

from typing import Annotated, Final

from fastapi import Depends, Request

from evalstore.api.access import Caller, Permission
from evalstore.api.service import service_of

# The scope of everything below /storage/webhooks.
WEBHOOKS_SCOPE: Final[Permission] = "write"


async def reader(request: Request) -> Caller:
    """Return the caller of a request that reads. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, "read")


async def writer(request: Request) -> Caller:
    """Return the caller of a request that writes. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, "write")


Writer = Annotated[Caller, Depends(writer)]


async def webhook_manager(request: Request) -> Caller:
    """Return the caller of a request about webhooks. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, WEBHOOKS_SCOPE)


WebhookManager = Annotated[Caller, Depends(webhook_manager)]

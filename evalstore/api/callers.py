"""The caller of a request, as a FastAPI dependency that checks the key."""

from typing import Annotated

from fastapi import Depends, Request

from evalstore.api.access import Caller
from evalstore.api.service import service_of


async def reader(request: Request) -> Caller:
    """Return the caller of a request that reads. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, "read")


Reader = Annotated[Caller, Depends(reader)]


async def writer(request: Request) -> Caller:
    """Return the caller of a request that writes. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, "write")


Writer = Annotated[Caller, Depends(writer)]


async def admin(request: Request) -> Caller:
    """Return the caller of a request that administers. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, "admin")


Admin = Annotated[Caller, Depends(admin)]

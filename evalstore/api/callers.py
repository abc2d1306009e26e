"""The caller of a request, as a FastAPI dependency that checks the key."""

from typing import Annotated, Final

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from evalstore.api.access import Caller
from evalstore.api.service import service_of

# For the document alone: Access reads the headers itself, because fast_reads.py has no dependencies.
_SCHEMES: Final = (
    Security(HTTPBearer(scheme_name="bearer", auto_error=False)),
    Security(APIKeyHeader(name="X-API-Key", scheme_name="header", auto_error=False)),
)


async def reader(request: Request, _bearer: Annotated[object, _SCHEMES[0]], _header: Annotated[object, _SCHEMES[1]]) -> Caller:
    """Return the caller of a request that reads. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, "read")


async def writer(request: Request, _bearer: Annotated[object, _SCHEMES[0]], _header: Annotated[object, _SCHEMES[1]]) -> Caller:
    """Return the caller of a request that writes. Raises Problem: 401, 403, 503."""
    return await service_of(request).access.authorize(request, "write")


Writer = Annotated[Caller, Depends(writer)]

"""Open the lake's tables: the catalog in PostgreSQL or at EVALSTORE_LAKE_CATALOG_URL, the files at EVALSTORE_LAKE_URL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from evalstore.lake.errors import LakeDamaged, LakeMismatch, LakeOutage
from evalstore.lake.schema import VERSION, LakeTable, iceberg_schema
from evalstore.storage import database
from models.addresses import parse_store_url
from models.errors import EvalstoreError, InvalidSettings
from models.extras import how_to_install, is_installed
from models.settings import Settings

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table

NAMESPACE: Final = "evalstore"
_ID: Final = "evalstore.id"
_SCHEMA_VERSION: Final = "evalstore.schema-version"


@contextmanager
def errors() -> Iterator[None]:
    """Translate errors of the lake's libraries to LakeOutage; a lost race stays as it is."""
    from pyiceberg.exceptions import CommitFailedException, RESTError, ServerError  # noqa: PLC0415 - see Lake.open
    from requests.exceptions import RequestException  # noqa: PLC0415

    try:
        yield
    except (EvalstoreError, CommitFailedException):
        raise
    except FileNotFoundError as error:
        raise LakeDamaged(f"a file of the lake is missing: {error}") from error
    except (OSError, RequestException, RESTError, ServerError) as error:
        raise LakeOutage(f"{type(error).__name__}: {error}") from error
    except SQLAlchemyError as error:
        with database.errors():
            raise
        raise LakeOutage(f"{type(error).__name__}: {error}") from error


def warehouse(settings: Settings) -> str:
    """Return EVALSTORE_LAKE_URL as a location for Iceberg. Raises InvalidSettings."""
    if settings.lake_url is None:
        raise InvalidSettings("EVALSTORE_LAKE_URL: not set; it names the warehouse, like s3://bucket/prefix")
    if not is_installed("lake"):
        raise InvalidSettings(f"EVALSTORE_LAKE_URL: {how_to_install('lake')}")
    scheme, place, prefix = parse_store_url(settings.lake_url)
    if scheme == "file":
        return f"file://{place.rstrip('/')}"
    return f"s3://{place}/{prefix}".rstrip("/")


def file_properties(settings: Settings) -> dict[str, str]:
    """Return pyiceberg's settings for S3: those of the object store, with credentials as boto3 finds them."""
    if parse_store_url(settings.lake_url or "")[0] == "file":
        return {}
    import boto3  # type: ignore[import-untyped]  # noqa: PLC0415 - a folder needs none

    session = boto3.session.Session()
    found = {
        "s3.region": session.region_name or "us-east-1",
        "s3.connect-timeout": "5",
        "s3.request-timeout": "30",
        "s3.endpoint": settings.s3_endpoint_url or "",
    }
    if settings.s3_addressing_style == "virtual":
        found["s3.force-virtual-addressing"] = "true"
    keys = session.get_credentials()
    if keys is not None and not hasattr(keys, "refresh_needed"):  # Arrow finds and renews credentials that expire
        found |= {
            "s3.access-key-id": keys.access_key,
            "s3.secret-access-key": keys.secret_key,
            "s3.session-token": keys.token or "",
        }
    return {name: value for name, value in found.items() if value}


def open_catalog(settings: Settings, engine: Engine) -> "Catalog":
    """Return the catalog. Connects to a REST catalog. Raises LakeOutage."""
    properties = {
        **file_properties(settings),
        "warehouse": warehouse(settings),
        "py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO",
    }
    if settings.lake_catalog_url is None:
        return _sql_catalog(engine, properties)
    from pyiceberg.catalog.rest import RestCatalog  # noqa: PLC0415 - as above

    given = {"uri": settings.lake_catalog_url}
    if settings.lake_catalog_warehouse:
        given["warehouse"] = settings.lake_catalog_warehouse
    for name, secret in (("credential", settings.lake_catalog_credential), ("token", settings.lake_catalog_token)):
        if secret is not None:
            given[name] = secret.get_secret_value()
    with errors():
        return RestCatalog("evalstore", **(properties | given))


def _sql_catalog(engine: Engine, properties: dict[str, str]) -> "Catalog":
    from pyiceberg.catalog import MetastoreCatalog  # noqa: PLC0415 - as above
    from pyiceberg.catalog.sql import SqlCatalog  # noqa: PLC0415

    class DatabaseCatalog(SqlCatalog):  # type: ignore[misc, unused-ignore]
        """A catalog in tables of the database, on connections of evalstore's own."""

        def __init__(self) -> None:
            MetastoreCatalog.__init__(self, NAMESPACE, **properties)
            self.engine = engine
            self._schema_version = "v1"

    return DatabaseCatalog()


def evalstore_id(engine: Engine) -> str:
    """Return the id of this evalstore. Raises DatabaseOutage (retry)."""
    with engine.connect() as conn, database.errors(), conn.begin():
        ((found,),) = database.driver(conn).execute("SELECT id::text FROM lake_owner").fetchall()
    return str(found)


def open_table(catalog: "Catalog", table: LakeTable, owner: str, location: str, *, create: bool) -> "Table":
    """Return a table of this evalstore; it is created, and gets new columns, with `create`.

    Raises LakeMismatch, LakeOutage (retry).
    """
    from pyiceberg.exceptions import NoSuchTableError, TableAlreadyExistsError  # noqa: PLC0415 - as above

    name = (NAMESPACE, table.name)
    with errors():
        try:
            found = catalog.load_table(name)
        except NoSuchTableError:
            if not create:
                raise LakeMismatch(f"the lake has no table {table.name} yet: `evalstore sinks run` creates it") from None
            _refuse_used(catalog, f"{location}/{table.name}")
            try:
                found = _create(catalog, table, owner, location)
            except TableAlreadyExistsError:
                found = catalog.load_table(name)
        _check(found, table, owner, location)
        if create:
            _add_columns(found, table)
        return found


def _create(catalog: "Catalog", table: LakeTable, owner: str, location: str) -> "Table":
    from pyiceberg.partitioning import PartitionField, PartitionSpec  # noqa: PLC0415 - as above
    from pyiceberg.table.sorting import SortField, SortOrder  # noqa: PLC0415
    from pyiceberg.transforms import DayTransform, IdentityTransform  # noqa: PLC0415

    catalog.create_namespace_if_not_exists(NAMESPACE)
    day = PartitionField(table.id_of(table.time), 1000, DayTransform(), f"{table.time}_day")
    order = SortOrder(*(SortField(table.id_of(column), IdentityTransform()) for column in table.order))
    return catalog.create_table(
        (NAMESPACE, table.name),
        iceberg_schema(table),
        location=f"{location}/{table.name}",
        partition_spec=PartitionSpec(day),
        sort_order=order,
        properties={
            _ID: owner,
            _SCHEMA_VERSION: str(VERSION),
            "format-version": "2",
            "commit.retry.num-retries": "0",  # a retry of pyiceberg would append the same events again
            "commit.manifest.min-count-to-merge": "50",
            "write.metadata.delete-after-commit.enabled": "true",
            "write.metadata.previous-versions-max": "20",
            "write.metadata.metrics.default": "none",
            **{f"write.metadata.metrics.column.{column}": "full" for column in table.statistics},
        },
    )


def _refuse_used(catalog: "Catalog", location: str) -> None:
    """Refuse a folder that holds tables of another catalog."""
    from pyiceberg.io import load_file_io  # noqa: PLC0415 - as above

    metadata = f"{location}/metadata"
    if next(iter(listed(load_file_io(catalog.properties, metadata), metadata)), None) is not None:
        raise LakeMismatch(
            f"{location} holds a table that this evalstore's catalog does not know: another evalstore's, or this one's before"
            " its database was restored. Set another EVALSTORE_LAKE_URL, or run `evalstore lake recover`"
        )


def _check(found: "Table", table: LakeTable, owner: str, location: str) -> None:
    properties = found.properties
    if properties.get(_ID) != owner:
        raise LakeMismatch(f"the lake's table {table.name} belongs to another evalstore ({quote(str(properties.get(_ID)))})")
    if int(properties.get(_SCHEMA_VERSION, "0")) > VERSION:
        raise LakeMismatch(f"the lake's table {table.name} is of a newer release: deploy that release")
    if not found.location().rstrip("/").startswith(location.rstrip("/")):
        raise LakeMismatch(
            f"the catalog has the lake's table {table.name} at {found.location()}, not below EVALSTORE_LAKE_URL: {location}"
        )


def _add_columns(found: "Table", table: LakeTable) -> None:
    present = {field.name for field in found.schema().fields}
    missing = [field for field in iceberg_schema(table).fields if field.name not in present]
    if not missing and found.properties[_SCHEMA_VERSION] == str(VERSION):
        return
    with found.transaction() as transaction:
        with transaction.update_schema() as update:
            for field in missing:
                update.add_column(field.name, field.field_type, field.doc)
        transaction.set_properties({_SCHEMA_VERSION: str(VERSION)})


def listed(io: Any, folder: str) -> Iterator[Any]:
    """Yield the files below a folder, as pyarrow.fs.FileInfo. Raises OSError."""
    from pyarrow.fs import FileSelector, FileType  # noqa: PLC0415 - as above

    scheme, netloc, path = io.parse_location(folder)
    found = io.fs_by_scheme(scheme, netloc).get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    yield from (info for info in found if info.type == FileType.File)

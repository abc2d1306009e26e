"""After a restore of the database: lead the catalog to the newest state of the lake that its files show."""

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Engine

from evalstore.lake import catalog
from evalstore.lake.catalog import NAMESPACE
from evalstore.lake.errors import LakeMismatch
from evalstore.lake.schema import TABLES, LakeTable
from evalstore.storage import database
from models.errors import InvalidSettings
from models.settings import Settings

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog


class Recovered(NamedTuple):
    """A table: the state that the catalog had, and the newest one; the same if nothing was to do."""

    table: str
    before: str | None
    after: str | None


def run_once(settings: Settings, *, dry_run: bool = False) -> list[Recovered]:
    """Set the catalog of each table to the newest metadata file of this evalstore.

    Run it while no sink and no worker runs. Raises LakeOutage, DatabaseOutage (retry), LakeMismatch.
    """
    if settings.lake_catalog_url is not None:
        raise InvalidSettings("EVALSTORE_LAKE_CATALOG_URL: a REST catalog is not restored with the database")
    engine = database.connect(settings, pool_size=2)
    try:
        location, owner = catalog.warehouse(settings), catalog.evalstore_id(engine)
        opened = catalog.open_catalog(settings, engine)
        return [_recover(opened, engine, table, f"{location}/{table.name}", owner, dry_run=dry_run) for table in TABLES]
    finally:
        engine.dispose()


def _recover(opened: "Catalog", engine: Engine, table: LakeTable, location: str, owner: str, *, dry_run: bool) -> Recovered:
    from pyiceberg.exceptions import NoSuchTableError  # noqa: PLC0415 - only processes with a lake load this

    name = (NAMESPACE, table.name)
    with catalog.errors():
        try:
            found = opened.load_table(name)
            before, current = found.metadata_location, _order(found.metadata)
        except (NoSuchTableError, FileNotFoundError):
            before, current = _location(engine, table), (-1, -1)
        newest, after = max(_states(opened, location, owner), default=(current, before))
        if newest <= current or after == before:
            return Recovered(table.name, before, before)
        if not dry_run:
            _register(opened, engine, table, before, str(after))
        return Recovered(table.name, before, after)


def _order(metadata: Any) -> tuple[int, int]:
    return metadata.last_sequence_number, metadata.last_updated_ms


def _states(opened: "Catalog", location: str, owner: str) -> list[tuple[tuple[int, int], str]]:
    """Return all states of a table that its folder has, with their order. Raises LakeMismatch for another evalstore's."""
    from pyiceberg.io import load_file_io  # noqa: PLC0415 - as above
    from pyiceberg.serializers import FromInputFile  # noqa: PLC0415

    io = load_file_io(opened.properties, location)
    scheme, _, _ = io.parse_location(location)
    states = []
    for info in catalog.listed(io, f"{location}/metadata"):
        if not info.path.endswith(".metadata.json"):
            continue
        path = f"file://{info.path}" if scheme == "file" else f"{scheme}://{info.path}"
        metadata = FromInputFile.table_metadata(io.new_input(path))
        if metadata.properties.get("evalstore.id") != owner:
            raise LakeMismatch(f"{path} belongs to another evalstore")
        current = metadata.current_snapshot()
        if current is None or io.new_input(current.manifest_list).exists():
            states.append((_order(metadata), path))
    return states


_LOCATION = "SELECT metadata_location FROM iceberg_tables WHERE (catalog_name, table_namespace, table_name) = (%s, %s, %s)"
_MOVE = """
UPDATE iceberg_tables SET previous_metadata_location = metadata_location, metadata_location = %s
WHERE (catalog_name, table_namespace, table_name) = (%s, %s, %s) AND metadata_location = %s
"""


def _location(engine: Engine, table: LakeTable) -> str | None:
    with engine.connect() as conn, database.errors(), conn.begin():
        row = database.driver(conn).execute(_LOCATION, [NAMESPACE, NAMESPACE, table.name]).fetchone()
    return None if row is None else str(row[0])


def _register(opened: "Catalog", engine: Engine, table: LakeTable, before: str | None, after: str) -> None:
    if before is None:
        opened.create_namespace_if_not_exists(NAMESPACE)
        opened.register_table((NAMESPACE, table.name), after)
        return
    with engine.connect() as conn, database.errors(), conn.begin():
        database.driver(conn).execute(_MOVE, [after, NAMESPACE, NAMESPACE, table.name, before])

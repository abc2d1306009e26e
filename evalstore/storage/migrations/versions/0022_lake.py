"""The id that names this evalstore in the lake, and the tables of the lake's catalog, as pyiceberg defines them."""

from alembic import op

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    op.execute(
        "CREATE TABLE lake_owner (singleton smallint PRIMARY KEY DEFAULT 1 CHECK (singleton = 1),"
        " id uuid NOT NULL DEFAULT gen_random_uuid())"
    )
    op.execute("INSERT INTO lake_owner DEFAULT VALUES")
    # Another program may keep a catalog of its own in the same tables, under another name.
    op.execute(
        "CREATE TABLE IF NOT EXISTS iceberg_tables (catalog_name varchar(255) NOT NULL, table_namespace varchar(255) NOT NULL,"
        " table_name varchar(255) NOT NULL, metadata_location varchar(1000), previous_metadata_location varchar(1000),"
        " iceberg_type varchar(5), PRIMARY KEY (catalog_name, table_namespace, table_name))"
    )
    op.execute(
        "CREATE TABLE IF NOT EXISTS iceberg_namespace_properties (catalog_name varchar(255) NOT NULL,"
        " namespace varchar(255) NOT NULL, property_key varchar(255) NOT NULL, property_value varchar(1000) NOT NULL,"
        " PRIMARY KEY (catalog_name, namespace, property_key))"
    )

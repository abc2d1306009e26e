"""The only package that speaks to PostgreSQL and the object store."""

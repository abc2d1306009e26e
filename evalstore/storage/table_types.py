"""The metadata of all tables, and the types that their columns share."""

from typing import Final

from sqlalchemy import DateTime, MetaData, Text, text

METADATA: Final = MetaData()
EVAL_ID: Final = Text(collation="C")
TIME: Final = DateTime(timezone=True)
NOW: Final = text("now()")

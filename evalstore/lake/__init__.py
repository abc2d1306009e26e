"""The lake: Iceberg tables of events and of the records of retired evaluations. Libraries are loaded by `Lake.open`."""

"""Ledgers of before there were tables: folders of Parquet parts, of which the one written last holds."""

import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from rayseg import storage
from rayseg.tables import SEQUENCE

_READERS = 8
_PART = re.compile(r".*/part-\w+\.parquet")  # what no file of a table is called


def read(folder: str, schema: pa.Schema) -> pa.Table:
    """All rows of the parts in `folder`, with `schema`; the later a part, the greater its `sequence`, which ends at 0.

    A column that a part of an earlier version lacks is null.
    """
    if not storage.exists(folder):
        return schema.empty_table()
    parts = sorted((part for part in storage.list_files(folder) if _PART.fullmatch(part.uri)), key=_age)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="rayseg-parts") as pool:
        by_age = list(pool.map(storage.read_table, [part.uri for part in parts]))
    numbered = [_complete(part, schema, number - len(by_age)) for number, part in enumerate(by_age, start=1)]
    return pa.concat_tables([schema.empty_table(), *numbered])


def _complete(part: pa.Table, schema: pa.Schema, number: int) -> pa.Table:
    numbered = part.append_column(SEQUENCE, pa.array([number] * part.num_rows, pa.int64()))
    lacking = [field for field in schema if field.name not in numbered.column_names]
    for field in lacking:
        numbered = numbered.append_column(field, pa.nulls(part.num_rows, field.type))
    numbered = numbered.select(schema.names)
    # What is within a column may lack fields, too.
    return numbered if numbered.schema.equals(schema) else pa.Table.from_pylist(numbered.to_pylist(), schema=schema)


def _age(part: storage.FileInfo) -> tuple[float, str]:
    assert part.modified is not None
    return part.modified.timestamp(), part.uri

"""Reads data files: JSON in its usual layouts or JSON lines, plain or gzipped; Parquet; CSV.

The layout is detected from a file's content, not from its name; only CSV is known by its name. Messages count lines and
records from 1.
"""

import csv
import gzip
import itertools
import json
import os
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from rm.data import key_names
from rm.files import check_regular, unique_keys

LAYOUTS = 'expected {"instances": [...]}, a list of records, or JSON lines with one record per line'
# Of a few bytes that are packed, gzip makes as much as one likes.
LONGEST_LINE, MOST_BLANK = 2**30, 10**6
FREE, PACKED = 2**30, 200  # a gzipped file unpacks to at most FREE + PACKED * its size, in bytes
PARQUET_BATCH = 32_000_000  # bytes of strings that are in memory at a time, roughly


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (location, record) for each record of a file.

    The location is for messages: "file.jsonl line 12" or "file.json record 3". JSON lines, Parquet and CSV are read as
    they are consumed, other JSON as a whole.

    Raises:
        ValueError: the file cannot be read, or a record is not a JSON object.
    """
    check_regular(path)
    if _is_parquet(path):
        yield from _read_parquet(path)
        return
    if str(path).lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        yield from _read_csv(path)
        return
    lines = _numbered_lines(path)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        raise ValueError(f"{path}: the file is empty; {LAYOUTS}")
    number, line = first

    # A first line that is not JSON by itself may be the beginning of a document that spans several lines.
    try:
        first_value, first_error = _parse_json(line, path, number), None
    except ValueError as error:
        first_value, first_error = None, error

    second = next(((number, line) for number, line in lines if line.strip()), None)
    lines = itertools.chain([first], [] if second is None else [second], lines)
    is_document = isinstance(first_value, dict) and second is None and _records_in(first_value, path) is not None
    if isinstance(first_value, dict) and not is_document:
        records = _json_lines(lines, path)
    else:
        try:
            document = _parse_json("".join(text for _, text in lines), path, number)
        except ValueError as error:
            # If the name says JSON lines, the user has to correct the first line, not the file as one document.
            if first_error is not None and ".jsonl" in str(path):
                raise first_error from None
            raise error from None
        instances = document
        if isinstance(document, dict):
            instances = _records_in(document, path)
            _check_beside(document, path)
        if not isinstance(instances, list) or not instances:
            content = document if instances is None else instances
            raise ValueError(f"{path}: holds no records, but {reprlib.repr(content)}; {LAYOUTS}")
        instances = enumerate(instances, start=1)
        records = ((f"record {n}", record) for n, record in instances)

    for place, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path} {place}: is {reprlib.repr(record)}, not a JSON object; {LAYOUTS}")
        yield f"{path} {place}", record


def _json_lines(lines: Iterable[tuple[int, str]], path: str | Path) -> Iterator[tuple[str, object]]:
    """Yield ("line N", value) for each line that is not blank."""
    for number, text in lines:
        if text.strip():
            yield f"line {number}", _parse_json(text, path, number)


def _is_parquet(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except (OSError, ValueError):
        # `_numbered_lines` will fail for the same reason and explain it.
        return False


def _read_parquet(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield each row as a record."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: Parquet needs pyarrow: pip install "rm-trainer[parquet]"') from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_rows_at_a_time(file.metadata)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} record {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        problem = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: cannot be read beyond record {number} ({problem}); it is damaged or incomplete, copy it again"
        ) from None
    if number == 0:
        raise ValueError(f"{path}: the file has no records")


def _rows_at_a_time(metadata) -> int:
    """How many rows of a Parquet file to hold in memory: few, if they are long. A text that is stored once may be in
    all of them."""
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(1, min(64, PARQUET_BATCH * metadata.num_rows // max(1, size)))


def _read_csv(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield each row as a record of strings. An empty field is an empty string."""
    csv.field_size_limit(2**31 - 1)
    tab = str(path).lower().removesuffix(".gz").endswith(".tsv")
    lines = (line for _, line in _numbered_lines(path))
    names = next(lines, "")
    separator = "\t" if tab else ";" if ";" in names and "," not in names else ","  # ";" is Excel's in many countries
    rows = csv.DictReader(itertools.chain([names], lines), delimiter=separator, strict=True)
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if len(set(rows.fieldnames)) < len(rows.fieldnames):
                raise ValueError(f"{path}: has a column twice ({reprlib.repr(rows.fieldnames)}); rename one of them")
            if None in row or None in row.values():
                raise ValueError(
                    f"{path} record {number}: has not as many fields as the first line has names "
                    f"({reprlib.repr(rows.fieldnames)}); quote fields that hold a comma or a line break"
                )
            yield f"{path} record {number}", row
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read beyond record {number} ({error}); save it as CSV again") from None
    if number == 0:
        raise ValueError(f"{path}: the file has no records")


def _records_in(document: dict, path: str | Path) -> list | None:
    """The records in a JSON object: under "instances" or "data", or in columns; None if it is a record itself.

    In a file of JSON lines an object of lists is a record, also if it is alone.
    """
    if "instances" in document:
        return document["instances"]
    if isinstance(document.get("data"), list):
        return document["data"]
    if ".jsonl" in Path(path).suffixes:
        return None
    columns = {name: _column(values) for name, values in document.items()}
    lengths = {None if values is None else len(values) for values in columns.values()}
    if len(columns) < 2 or len(lengths) != 1 or lengths <= {None, 0}:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_beside(document: dict, path: str | Path) -> None:
    """Refuse what stands beside the records in a JSON object, unless it describes them."""
    records = next((key for key in ("instances", "data") if isinstance(document.get(key), list)), None)
    for key, value in document.items():
        if records and key not in (records, "description", "citation") and key_names.is_lost(key, value):
            raise ValueError(f"{path}: has {key!r} beside {records!r}, which would be lost: write it into each record")


def _column(values) -> list | None:
    """The values of a column: of a list, or of pandas' {"0": value, "1": value}; None if it is none.

    A list of messages, or of other objects, is a value of a single record.
    """
    if isinstance(values, dict) and list(values) == [str(n) for n in range(len(values))]:
        return list(values.values())
    if isinstance(values, list) and not any(isinstance(value, dict) for value in values):
        return values
    return None


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def _parse_json(text: str, path: str | Path, line: int):
    """Parse JSON text that begins on this line of the file."""
    try:
        return _DECODER.decode(text.rstrip())
    except json.JSONDecodeError as error:
        location = f"{path} line {line + error.lineno - 1} column {error.colno}"
        raise ValueError(f"{location}: is not JSON ({error.msg}); {LAYOUTS}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; very deep nesting
        raise ValueError(f"{path} line {line}: cannot be read as JSON ({error}); {LAYOUTS}") from None


def _numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of a file, plain or gzipped."""
    number = blank = 0
    try:
        with open(path, "rb") as file:
            gzipped = file.peek(2)[:2] == b"\x1f\x8b" or str(path).endswith(".gz")
            unpacked = gzip.open(file) if gzipped else file
            most, read = FREE + PACKED * os.fstat(file.fileno()).st_size, 0
            for number, line in enumerate(iter(partial(unpacked.readline, LONGEST_LINE + 1), b""), start=1):
                read += len(line)
                if gzipped and read > most:
                    raise ValueError(f"it unpacks to more than {most:,} bytes, as no text does: unpack it to read it")
                blank = blank + 1 if line.isspace() else 0
                if blank > MOST_BLANK:
                    raise ValueError(f"the last {MOST_BLANK:,} lines are blank")
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"the next one has more than {LONGEST_LINE:,} bytes: write one record per line")
                # Files from Windows may begin with a byte order mark, which "utf-8-sig" removes.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        return
    except IsADirectoryError:
        problem = f"is a folder; name the files in it, such as {path}/*.jsonl"
    except FileNotFoundError:
        problem = "no such file; give a file on this machine, or hub:org/name/FILE"
    except UnicodeDecodeError as error:
        problem = f"line {number} is not UTF-8 ({error.reason}); save the file as UTF-8"
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"cannot be read beyond line {number} ({error}); give a file that is readable and complete"
    raise ValueError(f"{path}: {problem}")

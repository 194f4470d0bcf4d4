"""Files to records: {"instances": [record, ...]}, a list of records, or JSON lines, plain or gzipped; or Parquet.

A file's content decides which, not its name. Messages count lines and records from 1.
"""

import gzip
import itertools
import json
import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path

SHAPES = 'expected {"instances": [...]}, a list of records, or JSON lines with one record a line'


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where, record) for each record; `where` is "file.jsonl line 12" or "file.json record 3".

    JSON lines and Parquet are read as they are consumed.
    """
    if _is_parquet(path):
        yield from _read_parquet(path)
        return
    lines = _lines(path)
    number, line = next((pair for pair in lines if pair[1].strip()), (0, ""))
    if number == 0:
        raise ValueError(f"{path}: the file is empty; {SHAPES}")
    try:
        opening, broken = _parse(line, path, number), None
    except ValueError as error:  # as JSON lines it is broken, but a document may run over many lines
        opening, broken = None, error
    lines = itertools.chain([(number, line)], lines)
    if isinstance(opening, dict) and "instances" not in opening:
        found = ((f"line {n}", _parse(text, path, n)) for n, text in lines if text.strip())
    else:
        try:
            document = _parse("".join(text for _, text in lines), path, number)
        except ValueError as error:
            raise (broken if broken and ".jsonl" in str(path) else error) from None
        records = _instances(document, path)
        found = ((f"record {n}", record) for n, record in enumerate(records, start=1))
    for place, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{path} {place}: is {reprlib.repr(record)}, not an object; {SHAPES}")
        yield f"{path} {place}", record


def _is_parquet(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except (OSError, ValueError):  # which `_lines` will meet, too, and explain
        return False


def _read_parquet(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Every row, as JSON would have it: a column that is null in a row is a key that its record lacks."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: Parquet needs pyarrow: pip install "rm-trainer[parquet]"') from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} record {number}", {key: value for key, value in row.items() if value is not None}
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        problem = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: cannot be read beyond record {number} ({problem}); give a file that is whole"
        ) from None
    if number == 0:
        raise ValueError(f"{path}: the file has no records")


def _instances(document, path: str | Path) -> list:
    if isinstance(document, dict):
        document = document.get("instances", document)
    if not isinstance(document, list) or not document:
        raise ValueError(f"{path}: its records are {reprlib.repr(document)}; {SHAPES}")
    return document


def _parse(text: str, path: str | Path, line: int):
    """The JSON that begins on this line of the file."""
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        where = f"{path} line {line + error.lineno - 1} column {error.colno}"
        raise ValueError(f"{where}: is not JSON ({error.msg}); {SHAPES}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ValueError(f"{path} line {line}: cannot be read as JSON ({error}); {SHAPES}") from None


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file, plain or gzipped."""
    number = 0
    try:
        with open(path, "rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b" or str(path).endswith(".gz")
            for number, line in enumerate(gzip.open(file) if packed else file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        return
    except IsADirectoryError:
        problem = f"is a folder; name the files in it, such as {path}/*.jsonl"
    except FileNotFoundError:
        problem = "no such file; give one on this machine, or hub:org/name/FILE"
    except UnicodeDecodeError as error:
        problem = f"line {number} is not UTF-8 ({error.reason}); save the file as UTF-8"
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"cannot be read beyond line {number} ({error}); give a file that is readable and whole"
    raise ValueError(f"{path}: {problem}")

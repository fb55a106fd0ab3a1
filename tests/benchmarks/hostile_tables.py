"""Memory and time of reading hostile tables of URLs: a cell of one GiB, or a million columns, in every format.

    python tests/benchmarks/hostile_tables.py [--folder DIR]

The tables take 7 GB in DIR. Each is read in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

GIB, MANY = 1 << 30, 1_000_000
URL = "https://example.org/1.jpg"


def filled(path: Path, start: str, piece: str, end: str) -> None:
    """A file with a gibibyte between a start and an end."""
    block = (piece * (1 + (1 << 20) // len(piece)))[: 1 << 20].encode()
    with path.open("wb") as file:
        file.write(start.encode())
        for _ in range(GIB >> 20):
            file.write(block)
        file.write(end.encode())


def write(folder: Path) -> None:
    """Write the tables."""
    row = f"{URL},b\n"
    filled(folder / "cell.csv", f"url,label\n{URL},", "a", f"\n{row}")
    filled(folder / "quoted.csv", f'url,label\n{URL},"', "a", f'"\n{row}')
    filled(folder / "quoted-lines.csv", f'url,label\n{URL},"', "a" * 99_999 + "\n", f'"\n{row}')
    filled(folder / "header.csv", "", "a", f"url,label\n{row}")
    filled(folder / "cell.txt", "https://example.org/", "a", f"\n{URL}\n")
    filled(folder / "cell.json", f'[{{"url":"{URL}","label":"', "a", f'"}},{{"url":"{URL}"}}]')
    filled(folder / "cell.jsonl", f'{{"url":"{URL}","label":"', "a", f'"}}\n{{"url":"{URL}"}}\n')
    names = ",".join(f"c{number}" for number in range(MANY))
    keys = ",".join(f'"c{number}":1' for number in range(MANY))
    (folder / "columns.csv").write_text(f"url,label,{names}\n{URL},b{',x' * MANY}\n")
    (folder / "row.csv").write_text(f"url,label\n{URL},b{',x' * MANY}\n{row}")
    (folder / "keys.json").write_text(f'[{{"url":"{URL}",{keys}}},{{"url":"{URL}"}}]')
    (folder / "keys.jsonl").write_text(f'{{"url":"{URL}",{keys}}}\n{{"url":"{URL}"}}\n')
    (folder / "deep.json").write_text("[" * MANY)
    small = {"compression": "zstd", "write_statistics": False, "store_schema": False}
    cell = {"url": [URL, URL], "label": ["a" * GIB, "b"]}
    pq.write_table(pa.table(cell), folder / "cell.parquet", use_dictionary=False, **small)
    pq.write_table(pa.table(cell), folder / "dictionary.parquet", **small)
    cells = {"url": [URL] * 1000, "label": ["a" * (1 << 20)] * 1000}
    pq.write_table(pa.table(cells), folder / "cells.parquet", use_dictionary=False, **small)
    wide = pa.Table.from_arrays(
        [pa.array([URL]), *([pa.array([1], pa.int8())] * MANY)], ["url", *(f"c{number}" for number in range(MANY))]
    )
    pq.write_table(wide, folder / "columns.parquet", use_dictionary=False, **small)


def peak() -> int:
    """The largest resident memory of this process in kilobytes; `ru_maxrss` begins with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def read(path: Path) -> None:
    """Read a table and print what it took, above what the libraries take."""
    from animesion_scrapers.url_tables import UrlTables

    before, start = peak(), time.process_time()
    good, faults = 0, Counter[str]()
    for batch in UrlTables(path).batches():
        good += sum(not row.fault for row in batch)
        faults.update(row.fault for row in batch if row.fault)
    taken = peak() - before
    told = [f"{count:,} x {fault}" for fault, count in faults.most_common(3)]
    print(json.dumps([path.name, taken >> 10, round(time.process_time() - start, 1), good, told]))


def main() -> None:
    """Write the tables and read each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        read(given.read)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        write(folder)
        for path in sorted(folder.iterdir()):
            done = subprocess.run([sys.executable, __file__, "--read", str(path)], capture_output=True, text=True)
            name, memory, seconds, good, faults = json.loads(done.stdout)
            print(f"{name:20} {memory:5} MB {seconds:5} s  {good} rows; {'; '.join(faults)}", flush=True)


if __name__ == "__main__":
    main()

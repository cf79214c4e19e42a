"""One's own data -> `documents/`: in parallel, resumed by parts, filtered, summarised.

Worker processes read a part each (`parts.py`), convert what can be used and leave it in
`parts/`, with a fingerprint of every picture. Then one pass over those facts chooses:
test first, then validation, then train, each in the order of the source up to its
limit, without near-duplicates of what was chosen before. So nothing of the evaluation
splits is trained on, and the result depends on neither workers nor interruptions.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cm3leon_jax.config import essential, write_whole
from cm3leon_jax.data import sources
from cm3leon_jax.data.documents import Skipped
from cm3leon_jax.data.duplicates import Seen, fingerprint
from cm3leon_jax.data.filters import IngestConfig
from cm3leon_jax.data.own_summary import COLUMNS, Summary, reasons
from cm3leon_jax.data.part_files import DUPLICATE, Job, PartFile, Rejected
from cm3leon_jax.data.parts import Kind, Part
from cm3leon_jax.data.shards import ShardWriter, shard_path

SUMMARY = "summary.json"
_PARTS = "parts"
_ORDER = ("test", "validation", "train")  # who is chosen first keeps a duplicate
_SECONDS_BETWEEN_LINES = 5.0
_TAKEN = tuple[PartFile, np.ndarray]  # rows of a part


def prepare(
    kind: Kind,
    config: Any,
    directory: str | Path,
    splits: Mapping[str, int | None],
    settings: IngestConfig | None = None,
) -> dict[str, Any]:
    """Writes the documents as `sources.prepare` does, and `summary.json`.

    Returns {split: {"documents", "skipped", "rejected", "seconds"}}. An interrupted run
    goes on: parts whose files are as they were are not read again. Raises OSError on a
    full disk or a worker that was killed, ValueError for an empty split, settings that
    do not fit the files and, if faults are refused, the first fault.
    """
    directory, start = Path(directory), time.monotonic()
    # Without a section, made_from reads as it did before there was one.
    more = [essential(settings)] if settings is not None else []
    made_from = {s: sources.made_of(config, n, *more) for s, n in splits.items()}
    done = {split: directory / f"{split}.json" for split in splits}
    finished = {
        split: sources.counts_of(path, made_from[split])
        for split, path in done.items()
        if path.is_file()
    }
    if finished.keys() == done.keys():
        return finished
    settings = settings or IngestConfig()
    job = Job(kind, config, settings, directory / _PARTS)
    job.directory.mkdir(parents=True, exist_ok=True)
    chosen = _choose_enough(job, list(kind.parts(config)), splits)
    results, described = {}, {}
    for split, limit in splits.items():
        taken, rejected = chosen[split]
        described[split] = _write(directory, split, taken, rejected)
        skipped = [Skipped(item.id, item.reason) for item in rejected]
        sources.log_skipped(directory / "skipped.jsonl", split, skipped)
        count = sum(len(rows) for _, rows in taken)
        sources.say(f"{split}: {count:,} documents, {len(skipped):,} left out")
        sources.judge(directory, split, count, limit, skipped)
        seconds = round(time.monotonic() - start, 1)
        results[split] = {"documents": count, "skipped": len(skipped)}
        results[split] |= {"rejected": reasons(rejected), "seconds": seconds}
    write_whole(directory / SUMMARY, json.dumps(described, indent=1))
    for split, counts in results.items():
        said = counts | {"made_from": made_from[split]}
        write_whole(done[split], json.dumps(said))
    shutil.rmtree(job.directory)
    return results


def _choose_enough(
    job: Job, parts: Sequence[Part], splits: Mapping[str, int | None]
) -> dict[str, tuple[list[_TAKEN], list[Rejected]]]:
    """Reads parts until every split has its limit of documents, or all are read."""
    outside = _outside(job.settings)
    stream = _files(job, parts)
    read: list[PartFile] = []
    have: Counter[str] = Counter()
    wanted = {split: np.inf if n is None else n for split, n in splits.items()}
    with ExitStack() as stack:
        stack.callback(stream.close)
        while True:
            for file in stream:
                read.append(file)
                have.update(file.facts("split")["split"].tolist())
                if all(have[split] >= n for split, n in wanted.items()):
                    break
            else:
                return choose(read, job.settings, splits, outside)
            chosen = choose(read, job.settings, splits, outside)
            short = [
                split
                for split, limit in splits.items()
                if limit is None or sum(len(r) for _, r in chosen[split][0]) < limit
            ]
            if not short:
                return chosen
            # Near-duplicates are only known of afterwards: so many again.
            wanted = {split: 1.5 * have[split] + 1 for split in short}


def choose(
    files: Sequence[PartFile],
    settings: IngestConfig,
    splits: Mapping[str, int | None],
    outside: Sequence[tuple[int, np.ndarray, str]] = (),
) -> dict[str, tuple[list[_TAKEN], list[Rejected]]]:
    """For every split the rows that are taken of each part, and what is left out.

    Of records with the same name the first is taken; of near-duplicates too, in the
    order test, validation, train, after those `outside`. What comes after the limit of
    a split was not looked at, and is not counted.
    """
    seen = None if settings.duplicates is None else Seen(settings.duplicates)
    if seen is not None:
        for key, small, label in outside:
            seen.add(key, small, label)
    names: set[str] = set()
    chosen = {}
    for split in (name for name in _ORDER if name in splits):
        limit = splits[split]
        left = np.inf if limit is None else limit
        taken, rejected = [], []
        for file in files:
            if left <= 0:
                break
            facts = file.facts("split", "id", "record", "key", "small")
            rows, before, fate = [], -1, None
            for row in np.flatnonzero(facts["split"] == split).tolist():
                if left <= 0:
                    break
                record, name = int(facts["record"][row]), str(facts["id"][row])
                if record != before:  # documents of one picture share its fate
                    key, small = int(facts["key"][row]), facts["small"][row]
                    fate = _fate(names, seen, name, key, small, split)
                    before = record
                    if fate:
                        lost = Rejected(split, name, fate, DUPLICATE, record)
                        rejected.append(lost)
                if not fate:
                    names.add(name)
                    rows.append(row)
                    left -= 1
            end = np.inf if left > 0 else before
            rejected += [
                item
                for item in file.rejected()
                if item.split == split and item.record <= end
            ]
            taken.append((file, np.array(rows, np.int64)))
        chosen[split] = taken, rejected
    return chosen


def _fate(
    names: set[str],
    seen: Seen | None,
    name: str,
    key: int,
    small: np.ndarray,
    split: str,
) -> str | None:
    """Why a record is not taken; otherwise its picture is remembered."""
    if name in names:
        return "another record has this name"
    if seen is not None:
        if (twin := seen.find(key, small)) is not None:
            return f"near-duplicate of {twin}"
        seen.add(key, small, f"'{name}' ({split})")
    return None


def _outside(settings: IngestConfig) -> list[tuple[int, np.ndarray, str]]:
    """Fingerprints of the evaluation pictures of other systems."""
    found = []
    for folder in settings.against:
        for split in ("validation", "test"):
            for document in sources.read_documents(folder, split):
                label = f"'{document.id}' ({split} of {folder})"
                found += [(*fingerprint(p), label) for p in document.pictures]
    return found


def _files(job: Job, parts: Sequence[Part]) -> Generator[PartFile]:
    """The files of all parts in order, made where they are not there."""
    missing = [n for n, part in enumerate(parts) if not job.is_done(n, part)]
    workers = job.settings.workers
    workers = min(os.cpu_count() or 1 if workers is None else workers, len(missing))
    start = said = time.monotonic()
    bar = tqdm(total=len(parts), unit="part", disable=not sys.stderr.isatty())
    with ExitStack() as stack:
        stack.callback(bar.close)
        made = _made(job, parts, workers, stack)
        for number in made:
            bar.update()
            now = time.monotonic()
            if bar.disable and now - said > _SECONDS_BETWEEN_LINES:
                said, rate = now, (number + 1) / (now - start)
                ahead = (len(parts) - number - 1) / rate
                sources.say(
                    f"{number + 1:,} of {len(parts):,} parts, {ahead:,.0f} s left"
                )
            yield job.open(number)


def _made(
    job: Job, parts: Sequence[Part], workers: int, stack: ExitStack
) -> Iterator[int]:
    """Numbers of parts, in order, as soon as each is there."""
    if workers < 2:
        for number, part in enumerate(parts):
            job.run(number, part)
            yield number
        return
    # Not forked: the process may run threads of jax.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    stack.callback(pool.shutdown, cancel_futures=True)
    ahead, waiting = enumerate(parts), deque()
    while True:
        for number, part in itertools.islice(ahead, 2 * workers - len(waiting)):
            waiting.append((number, pool.submit(job.run, number, part)))
        if not waiting:
            return
        number, future = waiting.popleft()
        try:
            future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process was ended, perhaps for want of memory: run again, "
                "finished parts are kept, with fewer data.ingest.workers"
            ) from None
        yield number


def _write(
    directory: Path, split: str, taken: Sequence[_TAKEN], rejected: Sequence[Rejected]
) -> dict[str, Any]:
    """The documents of a split, in order; its summary."""
    count, summary = 0, Summary()
    shards = sources.SHARDS
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(shard_path(directory, split, k, shards)))
            for k in range(shards)
        ]
        for file, rows in taken:
            if not len(rows):
                continue
            facts = file.facts(*COLUMNS)
            summary.add({name: column[rows] for name, column in facts.items()})
            for data in file.read(rows):
                writers[count % shards].write(data)
                count += 1
    return {"documents": count} | summary.result(rejected)

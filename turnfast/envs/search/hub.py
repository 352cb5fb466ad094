"""Read questions and passages from the Hugging Face datasets HotpotQA (arXiv 1809.09600) and
TriviaQA (arXiv 1705.03551).

The rows come from the hub or from a local folder. A local folder is the output of
`DatasetDict.save_to_disk`, or it contains parquet files named train*.parquet and
validation*.parquet. No code from a dataset is executed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.signature import suggest
from ...errors import ConfigError
from ...tools import Passage
from ..optional import import_optional
from .files import Record

WORDS_PER_PASSAGE = 100
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Name and config of a dataset on the hub, and the functions that convert its rows."""

    hub: str
    config: str
    record: Callable[[Row], Record]
    passages: Callable[[Row], Iterator[Passage]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The questions of one split and their passages, without duplicates."""

    records: tuple[Record, ...]
    passages: tuple[Passage, ...]


def load_split(dataset: str, split: str, *, path: str | None, max_rows: int) -> Loaded:
    """Read at most `max_rows` rows of one split.

    Args:
        dataset: a name in `SOURCES`. split: "train" or "validation".
        path: a local folder or a hub name; None uses the dataset's own hub name.
    Raises:
        ConfigError: the dataset is unknown, the `data` extra is not installed, the folder does not
            contain the split, or a row does not have the dataset's format.
    """
    if dataset not in SOURCES:
        raise ConfigError(
            f"env.options.dataset: unknown dataset {dataset!r}{suggest(dataset, SOURCES)}"
        )
    source = SOURCES[dataset]
    records: dict[str, Record] = {}
    passages: dict[Passage, None] = {}
    for number, row in enumerate(itertools.islice(_rows(source, path, split), max_rows)):
        try:
            record = source.record(row)
            passages |= dict.fromkeys(source.passages(row))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"env.options.dataset: row {number} of {path or source.hub} ({split}) does "
                f"not have the format of {dataset}: {type(error).__name__}: {error}"
            ) from None
        records.setdefault(record.id, record)
    if not records:
        raise ConfigError(f"env.options.dataset: {path or source.hub} ({split}) has no rows")
    return Loaded(records=tuple(records.values()), passages=tuple(passages))


def _rows(source: Source, path: str | None, split: str) -> Iterable[Row]:
    datasets = import_optional("datasets", install="turnfast[data]")
    folder = Path(path) if path else None
    if folder is None or not folder.exists():
        # Streaming reads only the rows that are used, not the whole dataset.
        return datasets.load_dataset(path or source.hub, source.config, split=split, streaming=True)
    if (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if split not in saved:
            raise ConfigError(f"env.options.dataset_path: {folder} has no split {split!r}")
        return saved[split]
    if (folder / "state.json").is_file():
        raise ConfigError(
            f"env.options.dataset_path: {folder} is a single Dataset without splits; "
            "save a DatasetDict with train and validation"
        )
    files = sorted(str(file) for file in folder.rglob(f"{split}*.parquet"))
    if not files:
        raise ConfigError(
            f"env.options.dataset_path: {folder} contains no {split}*.parquet and no saved dataset"
        )
    return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)


def _hotpot_record(row: Row) -> Record:
    titles = dict.fromkeys(row["supporting_facts"]["title"])
    return Record(
        id=str(row["id"]),
        question=row["question"].strip(),
        answers=(row["answer"].strip(),),
        supporting_titles=tuple(titles),
    )


def _hotpot_passages(row: Row) -> Iterator[Passage]:
    context = row["context"]
    for title, sentences in zip(context["title"], context["sentences"], strict=True):
        yield Passage(title=title, text="".join(sentences).strip())


def _trivia_record(row: Row) -> Record:
    answer = row["answer"]
    accepted = dict.fromkeys([answer["value"], *answer["aliases"]])
    return Record(
        id=str(row["question_id"]),
        question=row["question"].strip(),
        answers=tuple(text for text in accepted if text.strip()),
        supporting_titles=tuple(dict.fromkeys(row["entity_pages"]["title"])),
    )


def _trivia_passages(row: Row) -> Iterator[Passage]:
    pages = row["entity_pages"]
    for title, text in zip(pages["title"], pages["wiki_context"], strict=True):
        words = text.split()
        for start in range(0, len(words), WORDS_PER_PASSAGE):
            yield Passage(title=title, text=" ".join(words[start : start + WORDS_PER_PASSAGE]))


SOURCES: Mapping[str, Source] = {
    "hotpot_qa": Source(
        hub="hotpotqa/hotpot_qa",
        config="distractor",
        record=_hotpot_record,
        passages=_hotpot_passages,
    ),
    "trivia_qa": Source(
        hub="mandarjoshi/trivia_qa",
        config="rc.wikipedia",
        record=_trivia_record,
        passages=_trivia_passages,
    ),
}

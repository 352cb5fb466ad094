"""Question answering over the user's own passages, with a BM25 search tool (arXiv 2505.11821).

    [env]
    name = "search"
    options = { questions = "questions.jsonl", corpus = "corpus.jsonl" }

or, with the `data` extra, `options = { dataset = "hotpot_qa" }`. The forms of the files are in
qa_files.py. One episode::

    system     Answer the question with the help of these tools: …
    user       Who wrote Ulm?
    assistant  <reasoning>…</reasoning><tool>{"name": "search", "args": {"query": "Ulm"}}</tool>
    user       <result>Ulm: Ulm was written by Ida.</result>
    assistant  <reasoning>…</reasoning><answer>Ida</answer>
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...config.schema import PositiveInt
from ...errors import ConfigError
from ...tools import Hit, Passage, SearchIndex, tool
from ...types import Task
from ..base import Split
from ..rewards.answers import mean
from ..tool_env import ToolEnv
from .files import Record, read_corpus, read_questions, split_records
from .hub import load_split


class SearchEnv(ToolEnv):
    """Questions from files or a Hugging Face data set, and a search tool over a corpus.

    Args:
        questions: JSONL file of questions. corpus: JSONL file of passages.
        eval_questions: JSONL file of the split "eval"; without it a share `eval_share` of the
            questions is set aside, chosen by `seed` and the questions' ids.
        dataset: "hotpot_qa" or "trivia_qa" instead of `questions`; their own passages are the
            corpus unless `corpus` is given.
        dataset_path: local folder, or another hub name, of that data set.
        dataset_rows: rows read per split.
        top_k: passages per search. max_passage_chars: a longer passage is cut, in characters.
        title_weight: how much a match in a title counts against one in the text.
        stem: match English words by their stem.
        index_folder: keep the index there and take it from there the next time; without it the
            index is built in memory, about 2 s for 100,000 passages.
        options: those of `ToolEnv`.
    Raises:
        ConfigError: a file that is missing or malformed (file, line, reason), or options that do
            not go together.
    """

    def __init__(
        self,
        *,
        questions: str | None = None,
        corpus: str | None = None,
        eval_questions: str | None = None,
        eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        seed: int = 0,
        dataset: str | None = None,
        dataset_path: str | None = None,
        dataset_rows: PositiveInt = 10_000,
        top_k: Annotated[int, Field(ge=1, le=100)] = 1,
        max_passage_chars: PositiveInt = 1000,
        title_weight: Annotated[float, Field(ge=0)] = 1.0,
        stem: bool = True,
        index_folder: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        passages: Sequence[Passage] = read_corpus(Path(corpus)) if corpus is not None else ()
        if dataset is not None:
            if questions is not None or eval_questions is not None:
                raise ConfigError("env.options: give either dataset or questions, not both")
            train = load_split(dataset, "train", path=dataset_path, max_rows=dataset_rows)
            held = load_split(dataset, "validation", path=dataset_path, max_rows=dataset_rows)
            self._records = {"train": train.records, "eval": held.records}
            passages = passages or tuple(dict.fromkeys(train.passages + held.passages))
        elif questions is not None and corpus is not None:
            asked = read_questions(Path(questions))
            if eval_questions is None:
                self._records = split_records(asked, share=eval_share, seed=seed)
            else:
                held_out = read_questions(Path(eval_questions))
                self._records = {"train": tuple(asked), "eval": tuple(held_out)}
                _refuse_overlap(asked, held_out, eval_questions)
        else:
            missing = "questions" if questions is None else "corpus"
            raise ConfigError(
                f"env.options.{missing}: this option must be given; "
                "env 'search' takes questions and corpus, or dataset"
            )
        self._top_k = top_k
        self._max_passage_chars = max_passage_chars
        self.index = _index(passages, index_folder, title_weight=title_weight, stem=stem)

    def tasks(self, split: Split) -> Sequence[Task]:
        return tuple(
            Task(
                id=record.id,
                question=record.question,
                answers=record.answers,
                data={"supporting_titles": record.supporting_titles},
            )
            for record in self._records[split]
        )

    @tool
    def search(self, query: str) -> str:
        """Search the corpus and get the passage that matches best.

        Args:
            query: words to look for.
        """
        return "\n".join(self._show(hit) for hit in self.index.search(query, self._top_k))

    def recall(self, k: int) -> float:
        """How far the plain question gets: the mean share of a question's supporting titles among
        the `k` best passages, over all questions that name supporting titles.

        Raises:
            ValueError: no question names any.

        Example: 2 supporting titles, 1 of them found in the best 5, count as 0.5.
        """
        shares: list[float] = []
        for record in (*self._records["train"], *self._records["eval"]):
            if wanted := set(record.supporting_titles):
                found = {hit.title for hit in self.index.search(record.question, k)}
                shares.append(len(wanted & found) / len(wanted))
        if not shares:
            raise ValueError("no question has supporting_titles, so there is no recall to measure")
        return mean(shares)

    def _show(self, hit: Hit) -> str:
        text = f"{hit.title}: {hit.text}" if hit.title else hit.text
        return (
            text if len(text) <= self._max_passage_chars else text[: self._max_passage_chars] + "…"
        )


def _refuse_overlap(train: Sequence[Record], held: Sequence[Record], path: str) -> None:
    both = {record.id for record in train} & {record.id for record in held}
    both |= {record.question for record in train} & {record.question for record in held}
    if both:
        raise ConfigError(
            f"{path}: {len(both)} ids or questions are in the training file as well, for instance "
            f"{sorted(both)[0]!r}; the evaluation would not be one"
        )


def _index(
    passages: Sequence[Passage], folder: str | None, *, title_weight: float, stem: bool
) -> SearchIndex:
    if folder is None:
        return SearchIndex(passages, title_weight=title_weight, stem=stem)
    hasher = hashlib.blake2b(f"stem={stem}".encode(), digest_size=16)
    for passage in passages:
        for text in (passage.title, passage.text):
            data = text.encode("utf-8")
            hasher.update(len(data).to_bytes(8, "big") + data)
    # named after its content: another corpus is another file, and never a stale answer
    path = Path(folder) / f"{hasher.hexdigest()}.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        # another process may have been quicker, with the same content
        with contextlib.suppress(FileExistsError):
            SearchIndex(passages, path=path, stem=stem).close()
    return SearchIndex(path=path, title_weight=title_weight)

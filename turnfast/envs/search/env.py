"""Question answering over the user's passages, with a BM25 search tool (arXiv 2505.11821).

    [env]
    name = "search"
    options = { questions = "questions.jsonl", corpus = "corpus.jsonl" }

or, with the `data` extra, `options = { dataset = "hotpot_qa" }`. The file formats are described in
files.py. One episode::

    system     Answer the question with the help of these tools: …
    user       Who wrote Ulm?
    assistant  <reasoning>…</reasoning><tool>{"name": "search", "args": {"query": "Ulm"}}</tool>
    user       <result>Ulm: Ulm was written by Ida.</result>
    assistant  <reasoning>…</reasoning><answer>Ida</answer>
"""

from __future__ import annotations

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
    """Questions from files or a Hugging Face dataset, and a search tool over a corpus.

    Args:
        questions: JSONL file of questions. corpus: JSONL file of passages.
        eval_questions: JSONL file of the split "eval"; if None, the share `eval_share` of the
            questions is held out, selected by `seed` and the ids of the questions.
        dataset: "hotpot_qa" or "trivia_qa" instead of `questions`. Without `corpus`, the passages
            of the dataset are the corpus.
        dataset_path: local folder or hub name to read the dataset from.
        dataset_rows: maximum number of rows to read per split.
        top_k: passages per search result.
        max_passage_chars: longer passages are truncated to this number of characters.
        title_weight: weight of a match in the title relative to one in the text.
        stem: match English words by their stem.
        options: options of `ToolEnv`.
    Raises:
        ConfigError: a file is missing or malformed, or options are missing or exclude each other.
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
        **options: Any,
    ) -> None:
        super().__init__(**options)
        passages: Sequence[Passage] = read_corpus(Path(corpus)) if corpus is not None else ()
        if dataset is not None:
            if questions is not None or eval_questions is not None:
                raise ConfigError("env.options: set either dataset or questions, not both")
            train = load_split(dataset, "train", path=dataset_path, max_rows=dataset_rows)
            held_out = load_split(dataset, "validation", path=dataset_path, max_rows=dataset_rows)
            self._records = {"train": train.records, "eval": held_out.records}
            passages = passages or tuple(dict.fromkeys(train.passages + held_out.passages))
        elif questions is not None and corpus is not None:
            records = read_questions(Path(questions))
            if eval_questions is None:
                self._records = split_records(records, share=eval_share, seed=seed)
            else:
                eval_records = read_questions(Path(eval_questions))
                _check_disjoint(records, eval_records, eval_questions)
                self._records = {"train": tuple(records), "eval": tuple(eval_records)}
        else:
            missing = "questions" if questions is None else "corpus"
            raise ConfigError(
                f"env.options.{missing}: this option is required; "
                "env 'search' needs questions and corpus, or dataset"
            )
        self._top_k = top_k
        self._max_passage_chars = max_passage_chars
        self.index = SearchIndex(passages, title_weight=title_weight, stem=stem)

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
        """Return the mean recall at `k` of the questions' supporting titles.

        The query is the question. If 1 of its 2 supporting titles is among the `k` best passages,
        its recall is 0.5.

        Raises:
            ValueError: no question has supporting titles.
        """
        recalls: list[float] = []
        for record in (*self._records["train"], *self._records["eval"]):
            if expected := set(record.supporting_titles):
                retrieved = {hit.title for hit in self.index.search(record.question, k)}
                recalls.append(len(expected & retrieved) / len(expected))
        if not recalls:
            raise ValueError("no question has supporting_titles, so recall is undefined")
        return mean(recalls)

    def _show(self, hit: Hit) -> str:
        text = f"{hit.title}: {hit.text}" if hit.title else hit.text
        limit = self._max_passage_chars
        return text if len(text) <= limit else text[:limit] + "…"


def _check_disjoint(train: Sequence[Record], held_out: Sequence[Record], path: str) -> None:
    shared = {record.id for record in train} & {record.id for record in held_out}
    shared |= {record.question for record in train} & {record.question for record in held_out}
    if shared:
        raise ConfigError(
            f"{path}: {len(shared)} ids or questions are also training questions, for example "
            f"{min(shared)!r}; remove them from one of the files"
        )

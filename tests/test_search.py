"""The search environment: file formats, error messages, splits, recall."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from by_script import play
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.envs import SearchEnv, load_env
from turnfast.envs.search.files import Record, read_corpus, read_questions, split_records
from turnfast.errors import ConfigError

PASSAGES = [
    {"title": "Ulm", "text": "Ulm is a novel that was written by Ida Berg.", "extra": 1},
    {"title": "Ida Berg", "text": "Ida Berg was born in Oslo."},
    {"title": "Rom", "text": "Rom is a painting by Ole Lund."},
    {"title": "", "text": "Nothing else is known."},
]
QUESTIONS = [
    {
        "id": "q1",
        "question": "Where was the author of the novel Ulm born?",
        "answers": ["Oslo"],
        "supporting_titles": ["Ulm", "Ida Berg"],
    },
    {"id": "q2", "question": "Who wrote Ulm?", "answers": ["Ida Berg", "Berg"]},
    {"id": "q3", "question": "Who painted Rom?", "answers": ["Ole Lund"]},
    {"id": "q4", "question": "What is Rom?", "answers": ["a painting"]},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    return {
        "questions": write(tmp_path / "questions.jsonl", QUESTIONS),
        "corpus": write(tmp_path / "corpus.jsonl", PASSAGES),
    }


def load(**options: Any) -> SearchEnv:
    env = load_env("search", options)
    assert isinstance(env, SearchEnv)
    return env


def test_an_episode(files):
    env = load(**files)
    task = next(t for t in (*env.tasks("train"), *env.tasks("eval")) if t.id == "q2")
    assert (task.question, task.answers) == ("Who wrote Ulm?", ("Ida Berg", "Berg"))

    call = '<tool>{"name": "search", "args": {"query": "who wrote the novel Ulm"}}</tool>'
    messages, (found, missed, last), outcome = play(
        env,
        task,
        f"<reasoning>I search.</reasoning>{call}",
        call.replace("who wrote the novel Ulm", "xyzzy"),
        "<reasoning>So.</reasoning><answer>Berg</answer>",
    )
    assert "Search the corpus" in messages[0]["content"]
    assert found.messages[0]["content"] == (
        "<result>Ulm: Ulm is a novel that was written by Ida Berg.</result>"
    )
    assert (found.reward, found.tool_successes) == (pytest.approx(0.7), 1)
    assert missed.messages[0]["content"] == "<result>No result.</result>"
    assert (missed.reward, missed.tool_calls, missed.tool_successes) == (0.0, 1, 0)
    assert last.done and outcome.metrics["exact_match"] == 1.0


def test_the_split_depends_on_the_seed_and_not_on_the_order(files, tmp_path):
    def eval_ids(**options: Any) -> set[str]:
        env = load(**{**files, **options})
        train, held_out = ({t.id for t in env.tasks(s)} for s in ("train", "eval"))
        assert not train & held_out and train | held_out == {"q1", "q2", "q3", "q4"}
        return held_out

    assert len(eval_ids()) == 1 and len(eval_ids(eval_share=0.5)) == 2
    assert len(eval_ids(eval_share=0.99)) == 3
    reversed_file = write(tmp_path / "reversed.jsonl", QUESTIONS[::-1])
    assert eval_ids() == eval_ids(questions=reversed_file)
    assert len({min(eval_ids(seed=seed)) for seed in range(12)}) > 1


@given(st.sets(st.text(), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers())
@settings(deadline=None)
def test_every_split_is_a_partition(ids, share, seed):
    records = [Record(id=name, question="?", answers=("x",)) for name in sorted(ids)]
    parts = split_records(records, share=share, seed=seed)
    assert parts["train"] and parts["eval"]
    assert sorted(r.id for part in parts.values() for r in part) == sorted(ids)


def test_recall_of_the_supporting_titles(files):
    env = load(**files, stem=False)
    assert env.recall(1) == 0.5
    assert env.recall(4) == 1.0
    with pytest.raises(ValueError, match="no question has supporting_titles"):
        write(Path(files["questions"]), QUESTIONS[1:])
        load(**files).recall(1)


def test_max_passage_chars_and_top_k(files):
    env = load(**files, top_k=2, max_passage_chars=12)
    assert env.search("Ida Berg").split("\n") == ["Ida Berg: Id…", "Ulm: Ulm is …"]


# --- error messages

GOOD = b'{"id": "a", "question": "Q?", "answers": ["x"]}\n'
MALFORMED_QUESTIONS = [
    (b"", ": the file contains no questions"),
    (b"\n \n", ": the file contains no questions"),
    (GOOD + b"{\n", ":2: not JSON: .*column"),
    (b"\n" + b"[1]\n", ":2: expected an object, got a list"),
    (b"invalid", ":1: not JSON"),
    (b'{"id": "a", "question": "\xff", "answers": ["x"]}', ":1: not UTF-8 .byte 26 of the line"),
    (b'{"id": "a", "question": "\\ud800", "answers": ["x"]}', ":1: 'question' contains a lone"),
    (b'{"question": "Q?", "answers": ["x"]}', ":1: field 'id' is missing; found: question, ans"),
    (b'{"id": "a", "answers": ["x"]}', ":1: field 'question' is missing"),
    (b'{"id": "a", "question": "Q?"}', ":1: field 'answers' is missing"),
    (b'{"id": 7, "question": "Q?", "answers": ["x"]}', ":1: 'id' is a number, expected a string"),
    (b'{"id": "a", "question": null, "answers": ["x"]}', ":1: 'question' is null, expected a s"),
    (b'{"id": "a", "question": " ", "answers": ["x"]}', ":1: 'question' is empty"),
    (b'{"id": "a", "question": "Q?", "answers": "x"}', ":1: 'answers' is a string, expected a l"),
    (b'{"id": "a", "question": "Q?", "answers": []}', ":1: 'answers' is empty"),
    (b'{"id": "a", "question": "Q?", "answers": ["x", 2]}', r":1: 'answers\[1\]' is a number"),
    (GOOD[:-2] + b', "supporting_titles": [""]}', r":1: 'supporting_titles\[0\]' is empty"),
    (GOOD + GOOD, ":2: duplicate id 'a', see line 1"),
    (GOOD + b"[" * 100_000, ":2: not JSON"),
]
MALFORMED_CORPORA = [
    (b"", ": the file contains no passages"),
    (b'{"title": "T", "text": "x"}\n{"title": "T"}', ":2: field 'text' is missing; found: title"),
    (b'{"text": "x"}', ":1: field 'title' is missing"),
    (b'{"title": "T", "text": ""}', ":1: 'text' is empty"),
    (b'{"title": ["T"], "text": "x"}', ":1: 'title' is a list, expected a string"),
]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [(read_questions, *row) for row in MALFORMED_QUESTIONS]
    + [(read_corpus, *row) for row in MALFORMED_CORPORA],
)
def test_malformed_files_are_errors_with_the_line(tmp_path, read, content, message):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}{message}"):
        read(path)


def test_blank_lines_byte_order_mark_and_crlf_are_accepted(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.strip() + b"\r\n\r\n" + GOOD.replace(b'"a"', b'"b"'))
    assert [record.id for record in read_questions(path)] == ["a", "b"]


def test_missing_files_and_conflicting_options(files, tmp_path):
    absent, one = str(tmp_path / "absent.jsonl"), write(tmp_path / "one.jsonl", QUESTIONS[:1])
    questions, corpus = files["questions"], files["corpus"]
    cases = (
        ({**files, "corpus": absent}, f"{absent}: No such file"),
        ({**files, "questions": str(tmp_path)}, "Is a directory"),
        ({**files, "questions": one}, "one question cannot be split"),
        ({"corpus": corpus}, "env.options.questions: this option is required"),
        ({"questions": questions}, "env.options.corpus: this option is required"),
        ({}, "env.options.questions: this option is required"),
        ({**files, "eval_questions": questions}, "8 ids or questions are also training questions"),
        ({**files, "eval_share": 1.0}, "env.options.eval_share: "),
        ({**files, "dataset": "hotpot_qa"}, "set either dataset or questions"),
        ({**files, "top_k": 0}, "env.options.top_k: "),
        ({**files, "corpuss": "x"}, "env.options.corpuss: no such option; did you mean 'corpus'"),
        ({"dataset": "hotpotqa"}, "unknown dataset 'hotpotqa'; did you mean 'hotpot_qa'"),
    )
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            load(**options)


def test_questions_for_evaluation_from_another_file(files, tmp_path):
    row = {"id": "e1", "question": "Where is Ida Berg from?", "answers": ["Oslo"]}
    env = load(**files, eval_questions=write(tmp_path / "eval.jsonl", [row]))
    assert [task.id for task in env.tasks("eval")] == ["e1"]
    assert len(env.tasks("train")) == 4


# --- Hugging Face datasets

HOTPOT = [
    {
        "id": f"h{i}",
        "question": "Where was the author of Ulm born?",
        "answer": "Oslo",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": {"title": ["Ulm", "Ida Berg", "Ulm"], "sent_id": [0, 0, 1]},
        "context": {
            "title": ["Ulm", "Ida Berg"],
            "sentences": [["Ulm is a novel.", " Ida Berg wrote it."], ["She was born in Oslo."]],
        },
    }
    for i in range(3)
]
TRIVIA = [
    {
        "question_id": f"t{i}",
        "question": "Who wrote Ulm? ",
        "answer": {"value": "Ida Berg", "aliases": ["Ida Berg", "I. Berg", " "]},
        "entity_pages": {"title": ["Ulm"], "wiki_context": ["Ulm " + "is long and " * 100]},
    }
    for i in range(2)
]


def save(folder: Path, **splits: list[Any]) -> str:
    datasets = pytest.importorskip("datasets", reason="needs the data extra (datasets)")
    rows = {name: datasets.Dataset.from_list(split) for name, split in splits.items()}
    datasets.DatasetDict(rows).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("layout", ["save_to_disk", "parquet"])
def test_hotpot_qa_from_a_local_folder(tmp_path, layout):
    datasets = pytest.importorskip("datasets", reason="needs the data extra (datasets)")
    folder = save(tmp_path / "saved", train=HOTPOT[:2], validation=HOTPOT[2:])
    if layout == "parquet":
        for split, rows in datasets.load_from_disk(folder).items():
            rows.to_parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet")
        folder = str(tmp_path)
    env = load(dataset="hotpot_qa", dataset_path=folder, dataset_rows=5)
    assert [task.id for task in env.tasks("train")] == ["h0", "h1"]
    assert [task.id for task in env.tasks("eval")] == ["h2"]
    task = env.tasks("train")[0]
    assert task.answers == ("Oslo",)
    assert task.data["supporting_titles"] == ("Ulm", "Ida Berg")
    assert env.index.num_passages == 2
    assert env.search("who wrote Ulm?") == "Ulm: Ulm is a novel. Ida Berg wrote it."
    assert env.recall(2) == 1.0


def test_trivia_qa_from_a_local_folder(tmp_path):
    folder = save(tmp_path / "trivia", train=TRIVIA, validation=TRIVIA)
    options = {"dataset": "trivia_qa", "dataset_path": folder}
    env = load(**options)
    assert env.tasks("train")[0].answers == ("Ida Berg", "I. Berg")
    assert env.tasks("train")[0].question == "Who wrote Ulm?"
    assert env.index.num_passages == 4  # 301 words, 100 to a passage

    env = load(**options, corpus=write(tmp_path / "corpus.jsonl", PASSAGES[:3]))
    assert env.index.num_passages == 3
    assert env.search("Oslo") == "Ida Berg: Ida Berg was born in Oslo."
    assert len(load(**options, dataset_rows=1).tasks("train")) == 1


def test_dataset_folders_without_the_expected_data_are_errors(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the data extra (datasets)")
    uneven = {**HOTPOT[0], "context": {"title": ["Ulm"], "sentences": []}}
    save(tmp_path / "trivia", train=TRIVIA)
    save(tmp_path / "uneven", train=[HOTPOT[0], HOTPOT[0], uneven])
    save(tmp_path / "no-eval", train=HOTPOT)
    datasets.Dataset.from_list(HOTPOT).save_to_disk(tmp_path / "single")
    (tmp_path / "empty").mkdir()
    cases = {
        "trivia": r"row 0 of .*trivia \(train\) does not have the format of hotpot_qa: KeyError",
        "uneven": r"row 2 of .*uneven \(train\) does not have the format of .*: ValueError",
        "no-eval": "no-eval has no split 'validation'",
        "single": "single is a single Dataset without splits",
        "empty": r"empty contains no train\*.parquet",
    }
    for folder, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            load(dataset="hotpot_qa", dataset_path=str(tmp_path / folder))


# --- real data

DATA = os.environ.get("TURNFAST_TEST_DATA", "")


@pytest.mark.skipif(not DATA, reason="needs TURNFAST_TEST_DATA, a folder of real data")
def test_recall_on_real_hotpot_questions():
    folder = Path(DATA) / "hotpotqa"
    env = load(questions=str(folder / "questions.jsonl"), corpus=str(folder / "corpus.jsonl"))
    assert len(env.tasks("train")) + len(env.tasks("eval")) == 100
    assert env.index.num_passages == 994
    recall_1, recall_5 = env.recall(1), env.recall(5)
    print(f"\nHotpotQA, plain question as query: recall@1 {recall_1:.3f}, recall@5 {recall_5:.3f}")
    assert recall_1 >= 0.40  # at most 0.5: every question has two supporting titles
    assert recall_5 >= 0.75

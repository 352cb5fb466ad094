"""The lookup world: facts, the held-out part, rewards per hop, and demonstrations."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import by_script
import pytest
from transformers import AutoTokenizer

from turnfast.envs import Demonstrator, LookupEnv, Task, contains_answer, load_env
from turnfast.envs.lookup.demos import malformations
from turnfast.errors import ConfigError
from turnfast.model.tiny import write_tiny_model
from turnfast.tools import ToolError, check_call, parse_calls

SMALL = {
    "people": 80,
    "held_out_people": 40,
    "train_tasks": 600,
    "eval_tasks": 60,
    "popular_questions": 20,
}


def make_env(*, demos=None, **options) -> LookupEnv:
    demos = {"count": 1500, "popular_passes": 20, **(demos or {})}
    env = load_env("lookup", {**SMALL, **options, "demos": demos}, max_turns=5)
    assert isinstance(env, LookupEnv)
    return env


@pytest.fixture(scope="module")
def env() -> LookupEnv:
    env = load_env("lookup", {"demos": {"count": 3000, "popular_passes": 10}})
    assert isinstance(env, LookupEnv)
    return env


@pytest.fixture(scope="module")
def deep() -> LookupEnv:
    return make_env(hops=[1, 2, 3, 4], inverted=0.3)


@pytest.fixture(scope="module")
def conversations(env) -> list[list[str]]:
    return texts_of(env)


def texts_of(env: LookupEnv, seed: int = 0) -> list[list[str]]:
    return [[str(m["content"]) for m in d.messages] for d in env.demonstrations(seed)]


def calls_of(conversations: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """The demonstrations with one call: those that end in an error, and the executed ones."""
    calls = [t for t in conversations if len(t) == 4 and "Tool: search(query)" in t[0]]
    failed = [t for t in calls if t[2].startswith("<result>Error")]
    return failed, [t for t in calls if t not in failed]


def answer_of(text: str) -> str:
    return text.removeprefix("<answer>").removesuffix("</answer>").strip()


def nouns_of(question: str) -> list[str]:
    """The relations of a question, first hop first."""
    return re.findall(r"the (\w+) of", question)[::-1]


def test_the_world_is_a_function_of_its_seed(env):
    again, other = LookupEnv(), LookupEnv(seed=1)
    assert again.training.region == env.training.region and again.held_out == env.held_out
    for split in ("train", "eval"):
        assert again.tasks(split) == env.tasks(split)
        assert other.tasks(split) != env.tasks(split)
    small = make_env()
    assert small.demonstrations(3) == make_env().demonstrations(3) != small.demonstrations(4)


def test_the_world_is_the_same_in_another_process_and_loads_no_torch(env):
    program = (
        "from turnfast.envs import LookupEnv; import sys; e = LookupEnv(); "
        "print(e.tasks('train')[7].question, e.tasks('eval')[7].answers, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    expected = (env.tasks("train")[7].question, env.tasks("eval")[7].answers, False)
    assert done.stdout.strip() == " ".join(map(str, expected))


@pytest.mark.parametrize("aliased", [0.1, 1.0])
def test_held_out_names_occur_nowhere_in_training(aliased):
    world = make_env(hops=[1, 2, 3, 4], aliased=aliased)
    held = {name for entity in world.held_out.entities for name in entity.names}
    known = {name for entity in world.training.region.entities for name in entity.names}
    assert not held & known
    for task in world.tasks("eval"):
        assert set(task.data["entities"]) <= held
    for task in world.tasks("train"):
        assert set(task.data["entities"]) <= known

    seen = " ".join(
        [task.question + " " + " ".join(task.answers) for task in world.tasks("train")]
        + list(world.corpus())
        + [text for texts in texts_of(world, seed=1) for text in texts]
    )
    words = re.findall(r"\w+", seen.lower())
    spans = set(words) | {f"{a} {b}" for a, b in pairwise(words)}
    assert not {name.lower() for name in held} & spans

    questions = [task.question for task in world.tasks("eval")]
    assert len(set(questions)) == len(questions)


def test_the_query_of_every_hop_finds_its_fact_despite_distractors(deep):
    for world in (deep, make_env(aliased=1.0, inverted=0.5)):
        for region in (world.training.region, world.held_out):
            assert region.distractors
            for fact in region.facts:
                assert fact.query == f"{fact.relation.noun} of {fact.subject.name}"
                for name in fact.subject.names:
                    assert world.search(f"{fact.relation.noun} of {name}") == fact.sentence
                assert contains_answer(fact.sentence, fact.object.names)
                assert fact.stated_name in fact.sentence


def test_answers_need_the_relation_and_cannot_be_guessed(env):
    tasks = env.tasks("eval")
    by_name = [contains_answer(env.search(t.data["entities"][0]), t.answers) for t in tasks]
    assert 0.1 < sum(by_name) / len(tasks) < 0.9
    ((_, most_frequent),) = Counter(task.answers[0] for task in tasks).most_common(1)
    assert most_frequent / len(tasks) < 0.05


def test_questions_follow_chains_of_facts(deep):
    assert Counter(task.data["hops"] for task in deep.tasks("eval")).keys() == {1, 2, 3, 4}
    for task in (*deep.tasks("train"), *deep.tasks("eval")):
        region = deep.training.region if task.id.startswith("train") else deep.held_out
        entities = task.data["entities"]
        assert len(entities) == len(set(entities)) == task.data["hops"] + 1
        name = entities[0]
        for noun, target in zip(nouns_of(task.question), entities[1:], strict=True):
            (fact,) = [f for f in region.facts_of[name] if f.relation.noun == noun]
            assert fact.object.name == target
            name = target
        assert task.answers[0] == entities[-1]
        assert not contains_answer(task.question, task.answers)


def test_a_quarter_of_the_training_questions_is_popular(env):
    popular = [task for task in env.tasks("train") if task.data["popular"]]
    assert len(popular) / len(env.tasks("train")) == pytest.approx(0.25, abs=0.03)
    assert len({task.question for task in popular}) == 64
    rare = {task.question for task in env.tasks("train") if not task.data["popular"]}
    assert not rare & {task.question for task in popular}
    assert not any(task.data["popular"] for task in env.tasks("eval"))


def test_aliases_are_accepted_and_used():
    world = make_env(aliased=1.0)
    region = world.training.region
    assert all(len(entity.names) == 2 for entity in region.of_kind("person"))
    people = [f for f in region.facts if f.object.kind == "person"]
    aliased = Counter(fact.stated_name == fact.object.alias for fact in people)
    assert 0.3 < aliased[True] / len(people) < 0.7
    assert any(t.data["entities"][0] not in t.question for t in world.tasks("train"))
    assert all(len(t.answers) == 2 for t in world.tasks("train") if "Who" in t.question)


def play_perfectly(world: LookupEnv, hops: int):
    """Turn rewards and outcome of a perfect agent on each eval question with `hops` hops."""
    played = []
    for task in [t for t in world.tasks("eval") if t.data["hops"] == hops]:
        name, chain = task.data["entities"][0], []
        for noun in nouns_of(task.question):
            chain += [f for f in world.held_out.facts_of[name] if f.relation.noun == noun]
            name = chain[-1].object.name
        call = '<tool>{{"name": "search", "args": {{"query": "{}"}}}}</tool>'
        answer = f"<answer>{chain[-1].stated_name}</answer>"
        _, (*steps, last), outcome = by_script.play(
            world, task, *(call.format(fact.query) for fact in chain), answer
        )
        assert [step.messages[0]["content"] for step in steps] == [
            f"<result>{fact.sentence}</result>" for fact in chain
        ]
        assert last.done and last.reward is None
        played.append(([round(step.reward, 9) for step in steps], outcome))
    return played


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_a_perfect_agent_gets_all_rewards(deep, hops):
    played = play_perfectly(deep, hops)
    assert played
    for rewards, outcome in played:
        assert rewards[-1] == 0.7 and set(rewards[:-1]) <= {0.2}
        assert outcome.reward == pytest.approx(1.9)
        assert outcome.metrics["exact_match"] == outcome.metrics["exact_match_rare"] == 1.0
        assert "exact_match_popular" not in outcome.metrics


def test_reward_hops_pays_for_each_hop():
    world = make_env(hops=[3], reward_hops=True)
    assert all(rewards == [0.7, 0.7, 0.7] for rewards, _ in play_perfectly(world, 3))


# --- demonstrations


def test_the_mixture_has_the_shares_of_its_options(env, conversations):
    assert len(conversations) == 3000
    assert all(len(text) < 120 for texts in conversations for text in texts)
    reading = [t for t in conversations if "<result>" in t[0]]
    assert len(reading) == 300
    for prompt, answer in reading:
        assert contains_answer(prompt.split("<result>")[1], [answer_of(answer)])

    questions = [t for t in conversations if "Tool: search(query)" in t[0]]
    malformed, executed = calls_of(questions)
    assert len(malformed) + len(executed) == round(0.3 * len(questions))
    assert len(malformed) == round(0.4 * 0.3 * len(questions))
    popular = {text: question.answers for text, question in env.training.popular.items()}

    rare = [t for t in executed if t[0].split("\n")[0] not in popular]
    assert len(rare) / len(executed) == pytest.approx(0.75, abs=0.06)
    copied = [t for t in rare if contains_answer(t[2], [answer_of(t[-1])])]
    assert len(copied) / len(rare) == pytest.approx(0.35, abs=0.06)

    at_once = [(t[0].split("\n")[0], answer_of(t[1])) for t in questions if len(t) == 2]
    known = [(question, answer) for question, answer in at_once if question in popular]
    assert len(known) == 64 * 10
    assert all(answer in popular[question] for question, answer in known)
    for question, answer in [pair for pair in at_once if pair[0] not in popular][:200]:
        noun, name = re.findall(r"the (\w+) of (.*)\?", question)[0]
        assert not contains_answer(env.search(f"{noun} of {name}"), [answer])


def test_names_can_be_tokenized_by_syllable(tmp_path):
    world = make_env(spelling="syllables")
    folder = write_tiny_model(tmp_path / "tiny", world.corpus(), seed=0, cut=world.token_cut)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = [name for entity in world.held_out.entities for name in entity.names]
    for name in held_out:
        tokens = tokenizer.tokenize(f" {name}")
        assert [token.lstrip("Ġ") for token in tokens] == re.findall("..", name.replace(" ", ""))
    text = f'{{"name": "search", "args": {{"query": "seat of {held_out[0]}"}}}} Where?'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_walks_look_up_one_fact_after_the_other():
    world = make_env(hops=[2, 4], demos={"walks": 0.3})
    texts = texts_of(world)
    walks = [text for text in texts if text[0].startswith("Step by step. ")]
    assert len(walks) == round(0.3 * len(texts))
    assert {len(walk) for walk in walks} == {2 * hops + 2 for hops in (2, 4)}
    facts = {fact.query: fact for fact in world.training.region.facts}
    for walk in walks:
        chain = [facts[query] for query in walk[1:-1:2]]
        assert [fact.sentence for fact in chain] == walk[2:-1:2]
        for fact, following in pairwise(chain):
            assert following.subject == fact.object
        assert chain[0].subject.name in walk[0] or str(chain[0].subject.alias) in walk[0]
        assert contains_answer(walk[-2], [answer_of(walk[-1])])


def test_malformed_demonstrations_fail_for_several_reasons(env, conversations):
    assert len({t[2] for t in calls_of(conversations)[0]}) == 5
    for tag in ("tool", "tool_call"):
        for malform in malformations(tag):
            call, *_ = parse_calls(malform("author of Sorime"))
            assert isinstance(check_call(env.tools, call), ToolError)


def test_replies_in_demonstrations_equal_those_of_an_episode(deep):
    async def replay() -> set[int]:
        num_calls = set()
        for first, *rest in texts_of(deep):
            question, _, tools = first.partition("\n")
            if tools != "Tool: search(query)":
                continue
            episode = deep.episode(Task(id="", question=question))
            assert await episode.start() == [{"role": "user", "content": first}]
            for text, reply in zip(rest[::2], rest[1::2], strict=False):
                step = await episode.step(text)
                assert [m["content"] for m in step.messages] == [reply]
            assert (await episode.step(rest[-1])).done
            num_calls.add(len(rest) // 2)
        return num_calls

    assert asyncio.run(replay()) == {0, 1, 2, 3, 4}


def test_demonstrations_follow_the_call_format_and_reasoning():
    native = make_env(call_format="native").demonstrations(0)
    assert next(d for d in native if len(d.messages) == 4).messages[2]["role"] == "tool"
    assert any("<tool_call>" in str(m["content"]) for d in native for m in d.messages)
    for texts in texts_of(make_env(reasoning=True)):
        if "Tool: search(query)" in texts[0]:
            assert all(text.startswith("<reasoning>") for text in texts[1::2])


def test_after_a_call_answers_are_copied_or_recalled():
    copies = make_env(demos={"malformed": 0.0, "copied": 1.0})
    failed, executed = calls_of(texts_of(copies))
    assert executed and not failed
    assert all(contains_answer(t[2], [answer_of(t[3])]) for t in executed)
    recalls = make_env(popular=1.0, demos={"malformed": 1.0, "recall_after_call": 1.0})
    failed, executed = calls_of(texts_of(recalls))
    assert failed and not executed
    for question, *_, answer in failed:
        assert answer_of(answer) in recalls.training.popular[question.split("\n")[0]].answers


def test_the_corpus_contains_each_text_once(env):
    corpus = env.corpus()
    assert isinstance(env, Demonstrator) and len(set(corpus)) == len(corpus)
    joined = "\n".join(corpus)
    for part in ("<tool>", "</tool>", '{"name": "search", "args"', "<answer>", "Error: ", "user\n"):
        assert part in joined


@pytest.mark.parametrize(
    ("options", "max_turns", "message"),
    [
        ({"hop": 2}, 4, r"^env.options.hop: no such option; did you mean 'hops'\?$"),
        ({"hops": 5}, 4, "env.options.hops: .*less than or equal to 4"),
        ({"hops": []}, 4, "env.options.hops: the list is empty"),
        ({"hops": [1, 3]}, 3, "env.max_turns: 3 leaves no turn .* set it to 4"),
        ({"people": 100_000}, 4, "env.options.people: the syllables allow no more names"),
        ({"demos": 100}, 4, r"env.options.demos: expected a section, \[env.options.demos\]"),
        (
            {"demos": {"popular_pass": 1, "calls": 2.0}},
            4,
            r"demos.calls: Input .*less .*\n?.*demos.popular_pass: .*mean 'popular_passes'",
        ),
        ({"demos": {"count": 100}}, 4, "env.options.demos.count: 100 is too small, 2604 are"),
        ({"held_out_people": 16, "eval_tasks": 500}, 4, "env.options.people: the world is too"),
    ],
)
def test_bad_options_are_named(options, max_turns, message):
    with pytest.raises(ConfigError, match=message):
        load_env("lookup", options, max_turns=max_turns).demonstrations(0)

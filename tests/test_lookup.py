"""The built-in world: facts to look up, a real held-out part, honest demonstrations."""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from turnfast.envs import Demonstrator, LookupEnv, contains_answer, load_env
from turnfast.envs.lookup.demos import malformations
from turnfast.errors import ConfigError
from turnfast.model.tiny import write_tiny_model
from turnfast.tools import ToolError, check_call, parse_call, parse_calls

SMALL = {"people": 80, "held_out_people": 40, "train_tasks": 600, "eval_tasks": 60}
SMALL |= {"popular_questions": 20, "demos": 1500, "demo_popular_passes": 20}


@pytest.fixture(scope="module")
def env() -> LookupEnv:
    return LookupEnv(demos=3000, demo_popular_passes=10)


@pytest.fixture(scope="module")
def deep() -> LookupEnv:
    return LookupEnv(**{**SMALL, "hops": [1, 2, 3, 4], "inverted": 0.3})


@pytest.fixture(scope="module")
def talks(env) -> list[list[str]]:
    return texts_of(env)


def texts_of(env: LookupEnv, seed: int = 0) -> list[list[str]]:
    return [[str(m["content"]) for m in d.messages] for d in env.demonstrations(seed)]


def test_the_world_is_a_function_of_its_seed(env):
    again, other = LookupEnv(), LookupEnv(seed=1)
    assert again.region == env.region and again.held_out == env.held_out
    for split in ("train", "eval"):
        assert again.tasks(split) == env.tasks(split)
        assert other.tasks(split) != env.tasks(split)
    small = LookupEnv(**SMALL)
    assert small.demonstrations(3) == LookupEnv(**SMALL).demonstrations(3)
    assert small.demonstrations(3) != small.demonstrations(4)


def test_the_same_world_in_another_process(env):
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
def test_the_held_out_part_is_a_real_test(aliased):
    world = LookupEnv(**{**SMALL, "hops": [1, 2, 3, 4], "aliased": aliased})
    held = {name for entity in world.held_out.entities for name in entity.names}
    known = {name for entity in world.region.entities for name in entity.names}
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
    spans = set(words) | {f"{a} {b}" for a, b in itertools.pairwise(words)}
    assert not {name.lower() for name in held} & spans

    questions = [task.question for task in world.tasks("eval")]
    assert len(set(questions)) == len(questions)


def test_every_hop_is_found_by_its_query_despite_false_friends(deep):
    for world in (deep, LookupEnv(**{**SMALL, "aliased": 1.0, "inverted": 0.5})):
        for region in (world.region, world.held_out):
            assert region.distractors
            for fact in region.facts:
                assert world.search(fact.query) == fact.sentence
                for name in fact.subject.names:
                    assert world.search(f"{fact.relation.noun} of {name}") == fact.sentence
                assert contains_answer(fact.sentence, fact.object.names)
                assert fact.said in fact.sentence


def test_a_name_alone_does_not_always_find_the_answer(env):
    tasks = env.tasks("eval")
    found = [contains_answer(env.search(task.data["entities"][0]), task.answers) for task in tasks]
    assert 0.1 < sum(found) / len(found) < 0.9


def test_questions_walk_along_facts(deep):
    assert Counter(task.data["hops"] for task in deep.tasks("eval")).keys() == {1, 2, 3, 4}
    for task in (*deep.tasks("train"), *deep.tasks("eval")):
        region = deep.region if task.id.startswith("train") else deep.held_out
        entities = task.data["entities"]
        assert len(entities) == len(set(entities)) == task.data["hops"] + 1
        nouns = re.findall(r"the (\w+) of", task.question)[::-1]
        names = entities[0]
        for noun, target in zip(nouns, entities[1:], strict=True):
            (fact,) = [f for f in region.facts_of[names] if f.relation.noun == noun]
            assert fact.object.name == target
            names = target
        assert task.answers[0] == entities[-1]
        assert not contains_answer(task.question, task.answers)


def test_a_quarter_of_the_training_questions_is_popular(env):
    popular = [task for task in env.tasks("train") if task.data["popular"]]
    assert len(popular) / len(env.tasks("train")) == pytest.approx(0.25, abs=0.03)
    assert len({task.question for task in popular}) == 64
    rare = {task.question for task in env.tasks("train") if not task.data["popular"]}
    assert not rare & {task.question for task in popular}
    assert not any(task.data["popular"] for task in env.tasks("eval"))
    half = LookupEnv(**{**SMALL, "eval_tasks": 20, "eval_popular": 0.5})
    assert sum(task.data["popular"] for task in half.tasks("eval")) == 10


def test_answers_are_spread_so_that_guessing_fails(env):
    answers = Counter(task.answers[0] for task in env.tasks("eval"))
    assert max(answers.values()) / len(env.tasks("eval")) < 0.05


def test_aliases_are_accepted_and_used():
    world = LookupEnv(**{**SMALL, "aliased": 1.0})
    assert all(len(entity.names) == 2 for entity in world.region.of_kind("person"))
    people = [f for f in world.region.facts if f.object.kind == "person"]
    said = Counter(fact.said == fact.object.alias for fact in people)
    assert 0.3 < said[True] / len(people) < 0.7
    asked = [task for task in world.tasks("train") if task.data["entities"][0] not in task.question]
    assert asked
    assert all(len(t.answers) == 2 for t in world.tasks("train") if "Who" in t.question)


def oracle(world: LookupEnv, hops: int):
    """Plays every eval question of so many hops as a perfect agent would."""

    async def run():
        outcomes = []
        for task in world.tasks("eval"):
            if task.data["hops"] != hops:
                continue
            episode = world.episode(task)
            await episode.start()
            region_facts = world.held_out.facts_of
            name, rewards = task.data["entities"][0], []
            for noun in re.findall(r"the (\w+) of", task.question)[::-1]:
                (fact,) = [f for f in region_facts[name] if f.relation.noun == noun]
                text = f'<tool>{{"name": "search", "args": {{"query": "{fact.query}"}}}}</tool>'
                step = await episode.step(text)
                assert step.messages[0]["content"] == f"<result>{fact.sentence}</result>"
                rewards.append(round(step.reward or 0.0, 9))
                name, said = fact.object.name, fact.said
            last = await episode.step(f"<answer>{said}</answer>")
            assert last.done and last.reward is None
            outcomes.append((rewards, await episode.finish()))
        return outcomes

    return asyncio.run(run())


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_a_perfect_agent_gets_everything(deep, hops):
    played = oracle(deep, hops)
    assert played
    for rewards, outcome in played:
        assert rewards[-1] == 0.7 and set(rewards[:-1]) <= {0.2}
        assert outcome.reward == pytest.approx(1.9)
        assert outcome.metrics["exact_match"] == outcome.metrics["exact_match_rare"] == 1.0
        assert "exact_match_popular" not in outcome.metrics


def test_each_hop_can_be_paid():
    world = LookupEnv(**{**SMALL, "hops": [3], "reward_hops": True})
    assert all(rewards == [0.7, 0.7, 0.7] for rewards, _ in oracle(world, 3))


# --- demonstrations


def test_the_mixture_is_what_its_options_say(env, talks):
    assert len(talks) == 3000
    reading = [t for t in talks if "<result>" in t[0]]
    assert len(reading) == 300
    for prompt, answer in reading:
        assert contains_answer(prompt.split("<result>")[1], [answer[8:-9].strip()])

    questions = [t for t in talks if "Tool: search(query)" in t[0]]
    calls = [t for t in questions if len(t) == 4]
    assert len(calls) == round(0.3 * len(questions))
    malformed = [t for t in calls if t[2].startswith("<result>Error")]
    assert len(malformed) == round(0.4 * len(calls))
    answers = {q.text: q.answers for q in env.popular}

    def kind(talk: list[str]) -> tuple[bool, bool]:
        """Whether the question is popular, and whether the answer stands in the result."""
        question = talk[0].split("\n")[0]
        return question in answers, contains_answer(talk[2], [talk[-1][8:-9].strip()])

    good = [kind(talk) for talk in calls if not talk[2].startswith("<result>Error")]
    rare = [in_result for popular, in_result in good if not popular]
    assert len(rare) / len(good) == pytest.approx(0.75, abs=0.06)
    assert sum(rare) / len(rare) == pytest.approx(0.35, abs=0.06)

    at_once = [t for t in questions if len(t) == 2]
    known = [t for t in at_once if t[0].split("\n")[0] in answers]
    assert len(known) == 64 * 10
    for prompt, answer in known:
        assert answer[8:-9].strip() in answers[prompt.split("\n")[0]]
    guesses = [t for t in at_once if t[0].split("\n")[0] not in answers][:200]
    for prompt, answer in guesses:
        noun, name = re.findall(r"the (\w+) of (.*)\?", prompt)[0]
        assert not contains_answer(env.search(f"{noun} of {name}"), [answer[8:-9].strip()])


def test_names_can_be_spelt_with_whole_syllables(tmp_path):
    world = LookupEnv(**SMALL, spelling="syllables")
    folder = write_tiny_model(tmp_path / "tiny", world.corpus(), seed=0, cut=world.token_cut)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = [name for entity in world.held_out.entities for name in entity.names]
    for name in held_out:
        spelt = tokenizer.tokenize(f" {name}")
        assert [token.lstrip("Ġ") for token in spelt] == re.findall("..", name.replace(" ", ""))
    text = f'{{"name": "search", "args": {{"query": "seat of {held_out[0]}"}}}} Where?'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_walks_ask_for_one_fact_after_the_other():
    world = LookupEnv(**{**SMALL, "hops": [2, 4], "demo_walks": 0.3})
    talks = [[str(m["content"]) for m in d.messages] for d in world.demonstrations(0)]
    walks = [talk for talk in talks if talk[0].startswith("Step by step. ")]
    assert len(walks) == round(0.3 * len(talks))
    assert {len(talk) for talk in walks} == {2 * hops + 2 for hops in (2, 4)}
    facts = {fact.query: fact for fact in world.region.facts}
    for talk in walks:
        walked = [facts[query] for query in talk[1:-1:2]]
        assert [fact.sentence for fact in walked] == talk[2:-1:2]
        for here, after in pairwise(walked):
            assert after.subject == here.object
        assert walked[0].subject.name in talk[0] or str(walked[0].subject.alias) in talk[0]
        assert contains_answer(talk[-2], [talk[-1][8:-9].strip()])


def test_malformed_demonstrations_fail_for_several_reasons(env, talks):
    errors = Counter(t[2] for t in talks if len(t) == 4 and "Error" in t[2])
    assert len(errors) == 5
    for tag in ("tool", "tool_call"):
        for malform in malformations(tag):
            call = parse_call(malform("author of Sorime"))
            assert call is not None
            assert isinstance(check_call(env.tools, call), ToolError)


def test_replies_in_demonstrations_are_those_of_an_episode(deep):
    async def replay() -> int:
        checked = 0
        for demonstration in deep.demonstrations(0)[:300]:
            first, *rest = [str(m["content"]) for m in demonstration.messages]
            tasks = [
                t for t in deep.tasks("train") if first == f"{t.question}\nTool: search(query)"
            ]
            if not tasks or len(rest) < 2:
                continue
            episode = deep.episode(tasks[0])
            assert await episode.start() == [demonstration.messages[0]]
            for said, reply in zip(rest[::2], rest[1::2], strict=False):
                step = await episode.step(said)
                assert [m["content"] for m in step.messages] == [reply]
                checked += 1
            assert (await episode.step(rest[-1])).done
        return checked

    assert asyncio.run(replay()) > 5


def test_multi_hop_demonstrations_search_hop_by_hop(deep):
    turns = Counter(
        sum(m["role"] == "assistant" for m in d.messages) for d in deep.demonstrations(0)
    )
    assert set(turns) == {1, 2, 3, 4, 5}


def test_native_and_reasoned_demonstrations():
    native = LookupEnv(**{**SMALL, "call_format": "native"})
    talk = next(d for d in native.demonstrations(0) if len(d.messages) == 4)
    assert talk.messages[2]["role"] == "tool"
    assert "<tool_call>" in "".join(t for texts in texts_of(native) for t in texts)
    reasoned = LookupEnv(**{**SMALL, "reasoning": True, "demo_malformed": 0.0})
    for demonstration in reasoned.demonstrations(0):
        if "Tool: search(query)" not in str(demonstration.messages[0]["content"]):
            continue
        for message in demonstration.messages:
            if message["role"] == "assistant":
                assert str(message["content"]).startswith("<reasoning>")


def test_a_mixture_without_bad_habits():
    clean = LookupEnv(**{**SMALL, "demo_malformed": 0.0, "demo_copied": 1.0, "demo_spaced": False})
    for talk in texts_of(clean):
        if len(talk) == 4:
            assert contains_answer(talk[2], [talk[3][8:-9]])
        assert not talk[-1].startswith("<answer> ")


def test_texts_are_short(env, talks):
    assert isinstance(env, Demonstrator)
    for texts in talks[:500]:
        assert len(texts[0].split()) <= 20
        assert all(len(text) < 120 for text in texts)
    longest = max(len(parse_calls(t)) for texts in talks[:500] for t in texts)
    assert longest == 1


def test_the_corpus_names_each_text_once(env):
    corpus = env.corpus()
    assert len(set(corpus)) == len(corpus)
    joined = "\n".join(corpus)
    for part in ("<tool>", "</tool>", '{"name": "search", "args"', "<answer>", "Error: ", "user\n"):
        assert part in joined


def test_refusals():
    cases = (
        ({"hop": 2}, {}, "env.options.hop: no such option; did you mean 'hops'"),
        ({"hops": 5}, {}, "env.options.hops: .*less than or equal to 4"),
        ({"hops": []}, {}, "env.options.hops: an empty list"),
        ({"hops": [1, 3]}, {"max_turns": 3}, "env.max_turns: 3 leaves no turn .* set it to 4"),
        ({"popular": 1.5}, {}, "env.options.popular: "),
        ({"people": "many"}, {}, "env.options.people: "),
        ({"demos": 100}, {}, "env.options.demos: 100 are too few, [0-9]+ are needed"),
        (
            {"held_out_people": 16, "eval_tasks": 500},
            {},
            "env.options.people: the world is too small",
        ),
    )
    for options, limits, text in cases:
        with pytest.raises(ConfigError, match=text):
            env = load_env("lookup", options, **limits)
            assert isinstance(env, LookupEnv)
            env.demonstrations(0)
    assert isinstance(load_env("lookup", {"hops": [1, 2]}, max_turns=3), LookupEnv)

"""The games and the calculator: rules, rewards, and whole rollouts with a scripted agent."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction

import pytest
from by_script import play, roll
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.credit import assign_credit
from turnfast.envs import Demonstrator, Task, load_env
from turnfast.envs.examples.frozen_lake import MOVES, Lake, draw_lake, read_move
from turnfast.envs.examples.wordle import mark
from turnfast.envs.examples.wordle_words import WORDS
from turnfast.errors import ConfigError
from turnfast.tools import calculate, format_number

# frozen lake


def lake_task(holes, size=3) -> Task:
    from turnfast.envs.examples.frozen_lake import _distances

    lake = Lake(size=size, holes=frozenset(holes), steps=_distances(size, frozenset(holes)))
    return Task(id="t", question="q", data={"lake": lake, "seed": "0"})


def lakes(**options):
    return load_env("frozen_lake", {"train_tasks": 20, "eval_tasks": 5, "demos": 20, **options})


def move(name: str) -> str:
    return f"<move>{name}</move>"


def test_a_crossing_pays_for_every_step_nearer_and_for_the_goal():
    env = lakes(progress=0.25)
    _, steps, outcome = play(
        env, lake_task({(1, 1)}), *map(move, ("right", "left", "up", "right", "right", "down"))
    )
    assert [step.reward for step in steps] == [0.25, -0.25, 0.0, 0.25, 0.25, 0.25]
    assert steps[0].messages[0]["content"] == ". @ .\n. O .\n. . G"
    _, steps, outcome = play(
        env, lake_task({(1, 1)}), *map(move, ("down", "DOWN", "right", " right "))
    )
    assert [step.done for step in steps] == [False, False, False, True]
    assert math.fsum(s.reward for s in steps) == 1.0 and outcome.reward == 1.0
    assert outcome.metrics == {"exact_match": 1.0, "fallen": 0.0, "moves": 4.0}


def test_falling_ends_it_and_a_turn_without_a_move_moves_nothing():
    env = lakes()
    _, steps, outcome = play(
        env, lake_task({(1, 1)}), "I go right.", move("north"), move("right"), move("down")
    )
    assert [step.reward for step in steps] == [-0.1, -0.1, 0.2, 0.0]
    assert [step.tool_successes for step in steps] == [0, 0, 1, 1]
    assert [step.done for step in steps] == [False, False, False, True]
    assert (outcome.reward, outcome.metrics["fallen"]) == (0.0, 1.0)


def test_moves_are_read_outside_of_thoughts():
    assert read_move("<reasoning><move>up</move></reasoning><move>Down</move>") == "down"
    assert read_move("<move>up</move> no, <move>left</move>") == "left"
    assert read_move("<move>jump</move>") is None and read_move("up") is None


def test_slips_are_to_the_sides_and_alike_for_every_rollout_of_a_task():
    env, task = lakes(slip=1.0), lake_task((), size=5)
    plays = [play(env, task, *[move("right")] * 6) for _ in range(2)]
    assert plays[0] == plays[1]
    for step in plays[0][1]:
        rows = step.messages[0]["content"].split("\n")
        assert "@" in {row[0] for row in rows}  # never to the right


def test_every_lake_can_be_crossed_and_no_eval_lake_is_trained_on():
    env = lakes(size=4, holes=0.4)
    train = {task.data["lake"].holes for task in env.tasks("train")}
    assert not train & {task.data["lake"].holes for task in env.tasks("eval")}
    for task in (*env.tasks("train"), *env.tasks("eval")):
        lake, cell = task.data["lake"], (0, 0)
        for left in range(lake.steps[cell], 0, -1):
            cell = min((lake.moved(cell, m) for m in MOVES), key=lambda c: lake.steps.get(c, 99))
            assert lake.steps[cell] == left - 1
        assert cell == lake.goal
    with pytest.raises(ConfigError, match=r"env.options.size: lakes of 2 x 2 are too few"):
        lakes(size=2)


def test_lakes_are_those_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    import random

    rng = random.Random(0)
    for _ in range(20):
        lake = draw_lake(rng, 4, 0.25)
        sign = {(0, 0): "S", lake.goal: "G", **dict.fromkeys(lake.holes, "H")}
        desc = ["".join(sign.get((r, c), "F") for c in range(4)) for r in range(4)]
        real = gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=False)
        state, _ = real.reset()
        cell, done = (0, 0), False
        while not done:
            name = rng.choice(["left", "down", "right", "up"])
            state, reward, done, _, _ = real.step(["left", "down", "right", "up"].index(name))
            cell = lake.moved(cell, name)
            assert divmod(int(state), 4) == cell
            assert done == (cell in lake.holes or cell == lake.goal)
            assert reward == float(cell == lake.goal)


def test_demonstrations_end_at_the_goal_or_on_a_move():
    env = lakes()
    assert isinstance(env, Demonstrator) and env.corpus()
    shown = env.demonstrations(1)
    assert len(shown) == 20 and shown == env.demonstrations(1) != env.demonstrations(2)
    for demonstration in shown:
        roles = [message["role"] for message in demonstration.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(read_move(m["content"]) for m in demonstration.messages[1::2])


def pilot(seen: str) -> str:
    """Reads the last lake and takes a shortest way."""
    board = re.findall(r"(?:^|\n)((?:[.@OG] ?)+)(?=\n|<|$|Move)", seen)
    rows = [line.split() for line in board][-4:]
    cells = {(r, c): sign for r, row in enumerate(rows) for c, sign in enumerate(row)}
    from turnfast.envs.examples.frozen_lake import _distances

    steps = _distances(4, frozenset(cell for cell, sign in cells.items() if sign == "O"))
    lake = Lake(size=4, holes=frozenset(), steps=steps)
    agent = next(cell for cell, sign in cells.items() if sign == "@")
    return move(min(MOVES, key=lambda m: steps.get(lake.moved(agent, m), 99)))


def test_rollouts_of_a_pilot_all_arrive_in_as_many_turns_as_the_way_is_long(chat):
    env = lakes(holes=0.3)
    groups = roll(chat, env, pilot, max_turns=20)
    for group in groups:
        length = group.task.data["lake"].steps[0, 0]
        for trajectory in group.trajectories:
            assert (trajectory.status, trajectory.outcome) == ("finished", 1.0)
            assert [turn.reward for turn in trajectory.turns] == [pytest.approx(0.2)] * length
        assert len(assign_credit(group, rule="mt_grpo").advantages[0]) == length


# wordle


@pytest.mark.parametrize(
    ("guess", "hidden", "marks"),
    [
        ("level", "label", "#..##"),
        ("allee", "label", "+++#."),
        ("label", "label", "#####"),
        ("speed", "abide", "..+.+"),
        ("speed", "erase", "+.++."),
        ("speed", "steal", "#.#.."),
        ("speed", "crepe", ".+#+."),
    ],
)
def test_marks_are_those_of_the_game(guess, hidden, marks):
    assert mark(guess, hidden) == marks


@given(st.sampled_from(WORDS), st.sampled_from(WORDS))
@settings(max_examples=200, deadline=None)
def test_marks_never_count_a_letter_more_often_than_it_is_there(guess, hidden):
    marks = mark(guess, hidden)
    for letter in set(guess):
        marked = sum(m != "." for g, m in zip(guess, marks, strict=True) if g == letter)
        assert marked == min(guess.count(letter), hidden.count(letter))
    assert all((m == "#") == (g == h) for g, h, m in zip(guess, hidden, marks, strict=True))


def test_the_list_of_words_and_its_split():
    assert len(set(WORDS)) == len(WORDS) > 500 and all(re.fullmatch("[a-z]{5}", w) for w in WORDS)
    env = load_env("wordle", {"seed": 3})
    hidden = {split: {t.answers[0] for t in env.tasks(split)} for split in ("train", "eval")}
    assert not hidden["train"] & hidden["eval"]
    assert hidden["train"] | hidden["eval"] == set(WORDS)


def guess(word: str) -> str:
    return f"<guess>{word}</guess>"


def test_turns_earn_what_they_find_out():
    env = load_env("wordle", {"knowledge": 1.0})
    task = Task(id="t", question="q", answers=("label",))
    _, steps, outcome = play(env, task, guess("crane"), guess("Crane"), guess("label"))
    assert steps[0].messages[0]["content"] == f"crane: {' '.join(mark('crane', 'label'))}"
    left = sum(mark("crane", word) == mark("crane", "label") for word in WORDS)
    assert steps[0].reward == pytest.approx(1 - math.log2(left) / math.log2(len(WORDS)))
    assert steps[1].reward == 0.0
    assert math.fsum(step.reward for step in steps) == pytest.approx(1.0)
    assert (outcome.reward, steps[2].done) == (1.0, True)
    assert outcome.metrics == {"exact_match": 1.0, "guesses": 3.0}


def test_six_guesses_and_it_is_lost():
    env = load_env("wordle", {})
    task = Task(id="t", question="q", answers=("label",))
    _, steps, outcome = play(env, task, "crane", guess("zzzzz"), *[guess("crane")] * 4)
    assert [step.done for step in steps] == [False] * 5 + [True]
    assert [step.reward for step in steps][:2] == [-0.1, -0.1]
    assert "not on the list" in steps[1].messages[0]["content"]
    assert outcome.reward == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [("crane", "needs two words"), ("crane\nslate\nhi", "'hi' is not a word of 5 letters")],
)
def test_a_bad_list_of_words_is_refused(tmp_path, text, message):
    (tmp_path / "w.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_env("wordle", {"words": str(tmp_path / "w.txt")})
    with pytest.raises(ConfigError, match=r"env.options.words: .* cannot be read"):
        load_env("wordle", {"words": str(tmp_path / "none.txt")})


def reasoner(seen: str) -> str:
    """Guesses the first word that fits all marks so far."""
    marks = re.findall(r"([a-z]{5}): ((?:[#+.] ?){5})", seen)
    for word in WORDS:
        if all(mark(said, word) == signs.replace(" ", "") for said, signs in marks):
            return guess(word)
    raise AssertionError("no word fits")


def test_rollouts_of_a_reasoner_vary_in_length_and_pay_up_to_knowledge(chat):
    env = load_env("wordle", {"guesses": 12})
    groups = roll(chat, env, reasoner, max_turns=12, group_size=2, num_tasks=6)
    played = [trajectory for group in groups for trajectory in group.trajectories]
    assert {t.outcome for t in played} == {1.0} and len({len(t.turns) for t in played}) > 1
    for t in played:
        assert math.fsum(turn.reward for turn in t.turns) == pytest.approx(0.5)


# arithmetic and the calculator

LEAVES = st.integers(0, 999).map(str)
SUMS = st.recursive(
    LEAVES,
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
    max_leaves=12,
)


@given(SUMS)
@settings(deadline=None)
def test_sums_are_exact(text):
    # an independent way: postfix with a stack, on the text without brackets
    stack: list[Fraction] = []
    try:
        for token in _postfix(text):
            if token.isdigit():
                stack.append(Fraction(token))
                continue
            right, left = stack.pop(), stack.pop()
            stack.append(
                {"+": left + right, "-": left - right, "*": left * right}.get(token)
                if token != "/"
                else left / right
            )
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            calculate(text)
        return
    assert calculate(text) == stack.pop()


def _postfix(text: str) -> list[str]:
    output, waiting = [], []
    for token in re.findall(r"\d+|[()+*/-]", text):
        if token.isdigit():
            output.append(token)
        elif token == ")":
            while (top := waiting.pop()) != "(":
                output.append(top)
        else:
            waiting.append(token)
    return output + waiting[::-1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1 + 0.2", Fraction(3, 10)),
        ("-2 ** 2", Fraction(-4)),
        ("2 ** -2", Fraction(1, 4)),
        ("7 // 2 + -7 % 3", Fraction(5)),
        ("+3", Fraction(3)),
    ],
)
def test_single_sums(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("__import__('os')", "only numbers"),
        ("a + 1", "only numbers"),
        ("(1).real", "only numbers"),
        ("[1][0]", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("1j", "only numbers"),
        ("True + 1", "not a number"),
        ("1 +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("1; 2", "not an arithmetic expression"),
        ("\x00", "not an arithmetic expression"),
        ("9 ** 9 ** 9 ** 9", "too large"),
        ("2 ** 0.5", "integer exponents"),
        ("10 ** 99999", "too large"),
        ("1e999", "too large"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("1 % 0", "division by zero"),
        ("(" * 300 + "1", "not an arithmetic expression"),
        ("-" * 499 + "1", "nested too deeply|not an arithmetic|$"),
        ("1 + " * 200 + "1", "more than 500 characters"),
    ],
)
def test_everything_else_is_refused_in_words(text, reason):
    if text.startswith("-" * 499):  # deep, but within bounds on most interpreters
        assert calculate(text) == -1
        return
    with pytest.raises(ValueError, match=reason):
        calculate(text)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_no_text_does_anything_but_compute_or_refuse(text):
    try:
        value = calculate(text)
    except ValueError:
        return
    assert isinstance(value, Fraction) and format_number(value)


def sums(**options):
    given = {"train_tasks": 20, "eval_tasks": 5, "reasoning": False, **options}
    return load_env("calculator", given, max_turns=9)


def test_sums_differ_between_the_splits_and_have_whole_answers():
    env = sums(operations=[1, 3])
    texts = [[t.question for t in env.tasks(split)] for split in ("train", "eval")]
    assert len(set(texts[0] + texts[1])) == 25
    for task in env.tasks("train"):
        assert re.fullmatch(r"-?\d+", task.answers[0])
        assert task.data["expression"].count(" ") in (2, 6)
    with pytest.raises(ConfigError, match=r"env.options.largest: 10 leaves too few"):
        sums(largest=10, operations=1, train_tasks=10_000)
    with pytest.raises(ConfigError, match=r"env.max_turns: 3 leaves no turn .* after 3 calls"):
        load_env("calculator", {"operations": 3, "max_operations": 1}, max_turns=3)


def clerk(seen: str) -> str:
    """Works out one innermost operation after the other, then answers."""
    text = re.findall(r"What is ([-\d+* ()]+)\?", seen)[-1]
    asked = re.findall(r'"expression": "([^"]+)"', seen.split("What is")[-1])
    results = re.findall(r"<result>(-?\d+)</result>", seen)
    for said, result in zip(asked, results, strict=True):
        text = text.replace(f"({said})", result, 1) if f"({said})" in text else result
    if re.fullmatch(r"-?\d+", text):
        return f"<answer>{text}</answer>"
    inner = re.search(r"\((-?\d+ [-+*] -?\d+)\)", text)
    call = {"name": "calculate", "args": {"expression": inner[1] if inner else text}}
    return f"<tool>{json.dumps(call)}</tool>"


def test_rollouts_of_a_clerk_take_a_turn_per_operation_and_one_to_answer(chat):
    env = sums(operations=[1, 2, 4], max_operations=1, largest=99)
    groups = roll(chat, env, clerk, max_turns=9, group_size=2, num_tasks=8)
    lengths = set()
    for group in groups:
        count = group.task.data["expression"].replace("(", "").replace(")", "").count(" ") // 2
        for t in group.trajectories:
            assert t.status == "finished" and t.metrics["exact_match"] == 1.0
            assert len(t.turns) == count + 1
            lengths.add(len(t.turns))
    assert len(lengths) > 1


def test_a_call_with_too_many_operations_is_an_error():
    env = sums(operations=2, max_operations=1)
    call = '<tool>{"name": "calculate", "args": {"expression": "1 + 2 + 3"}}</tool>'
    _, (step,), _ = play(env, env.tasks("train")[0], call)
    assert "2 operations; one call takes 1" in step.messages[0]["content"]
    assert step.reward == 0.0


# the lookup world with a variable number of turns


def test_hops_vary_the_number_of_turns(chat):
    options = {"hops": [1, 3], "people": 60, "held_out_people": 60, "popular_questions": 8}
    env = load_env("lookup", {**options, "train_tasks": 12, "eval_tasks": 8}, max_turns=5)
    names = {task.question: task.data["targets"] for task in env.tasks("train")}

    def seeker(seen: str) -> str:
        question = next(q for q in names if q in seen)
        asked = seen.count("<tool>")
        if asked < len(names[question]):
            return '<tool>{"name": "search", "args": {"query": "who"}}</tool>'
        return f"<answer>{names[question][-1][0]}</answer>"

    groups = roll(chat, env, seeker, max_turns=5, group_size=2, num_tasks=12)
    lengths = {len(t.turns) for group in groups for t in group.trajectories}
    assert lengths == {2, 4}
    assert all(t.metrics["exact_match"] == 1.0 for g in groups for t in g.trajectories)

"""Frozen lake, Wordle and the calculator: rules, rewards, and rollouts of a scripted agent."""

from __future__ import annotations

import json
import math
import random
import re
from fractions import Fraction

import pytest
from by_script import play, roll
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.credit import assign_credit
from turnfast.envs import Demonstrator, Task, load_env
from turnfast.envs.examples.frozen_lake import MOVES, draw_lake, make_lake, read_move
from turnfast.envs.examples.wordle import mark
from turnfast.envs.examples.wordle_words import WORDS
from turnfast.errors import ConfigError
from turnfast.tools import calculate, format_number

# frozen lake


def lake_task(holes, size=3) -> Task:
    lake = make_lake(size, frozenset(holes))
    return Task(id="t", question="q", data={"lake": lake, "seed": "0"})


def lakes(**options):
    return load_env("frozen_lake", {"train_tasks": 20, "eval_tasks": 5, "demos": 20, **options})


def move(name: str) -> str:
    return f"<move>{name}</move>"


@pytest.mark.parametrize(
    ("texts", "rewards", "at_goal", "num_moves"),
    [
        (["right", "left", "up", "right", "right", "down", " DOWN "], "+-0++++", 1.0, 7.0),
        (["", "north", "right", "down"], "mm+0", 0.0, 2.0),  # into the hole
    ],
)
def test_steps_toward_the_goal_and_the_goal_are_rewarded(texts, rewards, at_goal, num_moves):
    _, steps, outcome = play(lakes(), lake_task({(1, 1)}), *map(move, texts))
    values = {"+": 0.2, "-": -0.2, "0": 0.0, "m": -0.1}
    assert [step.reward for step in steps] == [values[sign] for sign in rewards]
    assert [step.tool_successes for step in steps] == [int(sign != "m") for sign in rewards]
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert outcome.reward == at_goal
    expected = {"exact_match": at_goal, "fallen": 1.0 - at_goal, "moves": num_moves}
    assert outcome.metrics == expected


def test_the_lake_is_shown_and_moves_inside_reasoning_are_ignored():
    text = "<reasoning><move>up</move></reasoning> <move>down</move> no, <move>Right</move>"
    _, (moved, ignored), _ = play(lakes(), lake_task({(1, 1)}), text, "right")
    assert moved.messages[0]["content"] == ". @ .\n. O .\n. . G"
    assert ignored.messages[0]["content"].startswith("Move: <move>")


def test_slips_go_sideways_and_are_equal_for_all_rollouts_of_a_task():
    env, task = lakes(slip=1.0), lake_task((), size=5)
    plays = [play(env, task, *[move("right")] * 6) for _ in range(2)]
    assert plays[0] == plays[1]
    for step in plays[0][1]:
        rows = step.messages[0]["content"].split("\n")
        assert "@" in {row[0] for row in rows}  # never to the right


def test_no_eval_lake_occurs_in_train():
    env = lakes(size=3, train_tasks=40)
    train = {task.data["lake"].holes for task in env.tasks("train")}
    assert not train & {task.data["lake"].holes for task in env.tasks("eval")}
    with pytest.raises(ConfigError, match=r"env.options.size: 2 x 2 cells allow fewer"):
        lakes(size=2)


def test_moves_agree_with_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
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
    demonstrations = env.demonstrations(1)
    assert len(demonstrations) == 20 and demonstrations == env.demonstrations(1)
    assert demonstrations != env.demonstrations(2)
    for demonstration in demonstrations:
        roles = [message["role"] for message in demonstration.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(read_move(m["content"]) for m in demonstration.messages[1::2])


def shortest_path(seen: str) -> str:
    """A move along a shortest safe path on the last lake."""
    board = re.findall(r"(?:^|\n)((?:[.@OG] ?)+)(?=\n|<|$|Move)", seen)
    rows = [line.split() for line in board][-4:]
    cells = {(r, c): sign for r, row in enumerate(rows) for c, sign in enumerate(row)}
    lake = make_lake(4, frozenset(cell for cell, sign in cells.items() if sign == "O"))
    agent = next(cell for cell, sign in cells.items() if sign == "@")
    return move(min(MOVES, key=lambda m: lake.steps.get(lake.moved(agent, m), 99)))


def test_rollouts_along_the_shortest_path_take_one_turn_per_step(chat):
    env = lakes(holes=0.3)
    groups = roll(chat, env, shortest_path, max_turns=20)
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
        ("speed", "crepe", ".+#+."),
    ],
)
def test_marks_of_repeated_letters(guess, hidden, marks):
    assert mark(guess, hidden) == marks


@given(st.sampled_from(WORDS), st.sampled_from(WORDS))
@settings(max_examples=200, deadline=None)
def test_a_letter_is_marked_at_most_as_often_as_it_occurs(guess, hidden):
    marks = mark(guess, hidden)
    for letter in set(guess):
        marked = sum(m != "." for g, m in zip(guess, marks, strict=True) if g == letter)
        assert marked == min(guess.count(letter), hidden.count(letter))
    assert all((m == "#") == (g == h) for g, h, m in zip(guess, hidden, marks, strict=True))


def test_the_splits_of_the_word_list_are_disjoint():
    assert len(set(WORDS)) == len(WORDS) > 500 and all(re.fullmatch("[a-z]{5}", w) for w in WORDS)
    env = load_env("wordle", {"seed": 3})
    hidden = {split: {t.answers[0] for t in env.tasks(split)} for split in ("train", "eval")}
    assert not hidden["train"] & hidden["eval"]
    assert hidden["train"] | hidden["eval"] == set(WORDS)


LABEL = Task(id="t", question="q", answers=("label",))


def guess(word: str) -> str:
    return f"<guess>{word}</guess>"


def test_turns_are_rewarded_by_information_gain():
    env = load_env("wordle", {"knowledge": 1.0})
    _, steps, outcome = play(env, LABEL, guess("crane"), guess("Crane"), guess("label"))
    assert steps[0].messages[0]["content"] == f"crane: {' '.join(mark('crane', 'label'))}"
    left = sum(mark("crane", word) == mark("crane", "label") for word in WORDS)
    assert steps[0].reward == pytest.approx(1 - math.log2(left) / math.log2(len(WORDS)))
    assert steps[1].reward == 0.0
    assert math.fsum(step.reward for step in steps) == pytest.approx(1.0)
    assert (outcome.reward, steps[2].done) == (1.0, True)
    assert outcome.metrics == {"exact_match": 1.0, "guesses": 3.0}


def test_the_game_is_lost_after_six_guesses():
    env = load_env("wordle", {})
    _, steps, outcome = play(env, LABEL, "crane", guess("zzzzz"), *[guess("crane")] * 4)
    assert [step.done for step in steps] == [False] * 5 + [True]
    assert [step.reward for step in steps][:2] == [-0.1, -0.1]
    assert "not on the list" in steps[1].messages[0]["content"]
    assert outcome.reward == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", "at least two words"),
        ("crane\nslate\nhi", "'hi' is not a word of 5 letters"),
    ],
)
def test_an_invalid_word_list_is_an_error(tmp_path, text, message):
    (tmp_path / "w.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_env("wordle", {"words": str(tmp_path / "w.txt")})
    with pytest.raises(ConfigError, match=r"env.options.words: .* cannot be read"):
        load_env("wordle", {"words": str(tmp_path / "none.txt")})


def first_fitting_word(seen: str) -> str:
    """A guess of the first word that fits all marks so far."""
    marks = re.findall(r"([a-z]{5}): ((?:[#+.] ?){5})", seen)
    fits = (
        word
        for word in WORDS
        if all(mark(guessed, word) == signs.replace(" ", "") for guessed, signs in marks)
    )
    return guess(next(fits))


def test_turn_rewards_of_solved_games_of_any_length_sum_to_knowledge(chat):
    env = load_env("wordle", {"guesses": 12})
    groups = roll(chat, env, first_fitting_word, max_turns=12, group_size=2, num_tasks=6)
    played = [trajectory for group in groups for trajectory in group.trajectories]
    assert {t.outcome for t in played} == {1.0} and len({len(t.turns) for t in played}) > 1
    for t in played:
        assert math.fsum(turn.reward for turn in t.turns) == pytest.approx(0.5)


# arithmetic and the calculator

LEAVES = st.integers(0, 999).map(str)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
    max_leaves=12,
)


@given(EXPRESSIONS)
@settings(deadline=None)
def test_arithmetic_is_exact(text):
    try:
        expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))  # by Python itself
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            calculate(text)
    else:
        assert calculate(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1 + 0.2", Fraction(3, 10)),
        ("-2 ** 2", Fraction(-4)),
        ("2 ** -2", Fraction(1, 4)),
        ("7 // 2 + -7 % 3", Fraction(5)),
        ("+3", Fraction(3)),
        ("-" * 499 + "1", Fraction(-1)),
    ],
)
def test_operators(text, value):
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
        ("1 + " * 200 + "1", "more than 500 characters"),
    ],
)
def test_invalid_expressions_are_errors(text, reason):

    with pytest.raises(ValueError, match=reason):
        calculate(text)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_is_computed_or_a_value_error(text):
    try:
        value = calculate(text)
    except ValueError:
        return
    assert isinstance(value, Fraction) and format_number(value)


def calculator(*, max_turns=9, **options):
    small = {"train_tasks": 20, "eval_tasks": 5, "reasoning": False}
    return load_env("calculator", {**small, **options}, max_turns=max_turns)


def test_expressions_differ_between_the_splits_and_have_integer_answers():
    env = calculator(operations=[1, 3])
    texts = [[t.question for t in env.tasks(split)] for split in ("train", "eval")]
    assert len(set(texts[0] + texts[1])) == 25
    for task in env.tasks("train"):
        assert re.fullmatch(r"-?\d+", task.answers[0])
        assert task.data["expression"].count(" ") in (2, 6)
    with pytest.raises(ConfigError, match=r"env.options.largest: 10 allows fewer than 405"):
        calculator(largest=10, operations=1, train_tasks=400)
    with pytest.raises(ConfigError, match=r"env.max_turns: 3 leaves no turn .* after 3 calls"):
        calculator(operations=3, max_operations=1, max_turns=3)


def one_operation(seen: str) -> str:
    """A call with one innermost operation, or the answer."""
    text = re.findall(r"What is ([-\d+* ()]+)\?", seen)[-1]
    asked = re.findall(r'"expression": "([^"]+)"', seen.split("What is")[-1])
    results = re.findall(r"<result>(-?\d+)</result>", seen)
    for expression, result in zip(asked, results, strict=True):
        inner = f"({expression})"
        text = text.replace(inner, result, 1) if inner in text else result
    if re.fullmatch(r"-?\d+", text):
        return f"<answer>{text}</answer>"
    inner = re.search(r"\((-?\d+ [-+*] -?\d+)\)", text)
    call = {"name": "calculate", "args": {"expression": inner[1] if inner else text}}
    return f"<tool>{json.dumps(call)}</tool>"


def test_rollouts_take_one_turn_per_operation_and_one_for_the_answer(chat):
    env = calculator(operations=[1, 2, 4], max_operations=1, largest=99)
    groups = roll(chat, env, one_operation, max_turns=9, group_size=2, num_tasks=8)
    lengths = set()
    for group in groups:
        count = group.task.data["expression"].replace("(", "").replace(")", "").count(" ") // 2
        for t in group.trajectories:
            assert t.status == "finished" and t.metrics["exact_match"] == 1.0
            assert len(t.turns) == count + 1
            lengths.add(len(t.turns))
    assert len(lengths) > 1


def test_a_call_with_too_many_operations_is_an_error():
    env = calculator(operations=2, max_operations=1)
    call = '<tool>{"name": "calculate", "args": {"expression": "1 + 2 + 3"}}</tool>'
    _, (step,), _ = play(env, env.tasks("train")[0], call)
    assert "2 operations; one call accepts 1" in step.messages[0]["content"]
    assert step.reward == 0.0

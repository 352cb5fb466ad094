"""Built-in reward functions of the task and the turns so far.

They are the default rewards of `ToolEnv`, and `[[env.rewards]]` selects them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...types import Task
from ..base import PlayedTurn
from . import answers


def final_answer(turns: Sequence[PlayedTurn]) -> str | None:
    """The answer in the last turn; None without one, or if the turn also calls a tool: the agent
    wrote that answer before it saw the result."""
    if not turns or turns[-1].calls:
        return None
    return answers.read_answer(turns[-1].text)


def exact_match(task: Task, turns: Sequence[PlayedTurn]) -> float:
    """1.0 if the final answer is one of the accepted answers."""
    answer = final_answer(turns)
    return 0.0 if answer is None else answers.exact_match(answer, task.answers)


def answer_contained(task: Task, turns: Sequence[PlayedTurn]) -> float:
    """1.0 if an accepted answer occurs in the final answer."""
    answer = final_answer(turns)
    return 0.0 if answer is None else answers.contains_answer(answer, task.answers)


def f1(task: Task, turns: Sequence[PlayedTurn]) -> float:
    """Word overlap of the final answer with the nearest accepted one."""
    answer = final_answer(turns)
    return 0.0 if answer is None else answers.f1(answer, task.answers)


def tool_executed(task: Task, turns: Sequence[PlayedTurn]) -> float:
    """Successful / attempted calls of the last turn."""
    calls = turns[-1].calls
    return sum(call.result.success for call in calls) / len(calls) if calls else 0.0


def answer_in_result(task: Task, turns: Sequence[PlayedTurn]) -> float:
    """1.0 if an accepted answer occurs in a result of the last turn for the first time."""
    *earlier, last = turns
    return float(_has_answer(task, last) and not any(_has_answer(task, t) for t in earlier))


def retrieval(task: Task, turns: Sequence[PlayedTurn]) -> float:
    """Share of the task's `supporting_titles` that occur in results of the last turn for the first
    time.

    Raises:
        ValueError: the task has no `supporting_titles`.
    """
    titles: Sequence[str] = task.data.get("supporting_titles", ())
    if not titles:
        raise ValueError(f"task {task.id!r} has no supporting_titles")
    *earlier, last = ("\n".join(successful_results(turn)).lower() for turn in turns)
    new = [t for t in set(titles) if t.lower() in last and t.lower() not in "\n".join(earlier)]
    return len(new) / len(set(titles))


def turn_format(
    task: Task, turns: Sequence[PlayedTurn], *, native: bool = False, reasoning: bool = True
) -> float:
    """`format_score` of the last turn."""
    return answers.format_score(turns[-1].text, native=native, reasoning=reasoning)


def turn_tags(
    task: Task, turns: Sequence[PlayedTurn], *, native: bool = False, reasoning: bool = True
) -> float:
    """`tags_score` of the last turn."""
    return answers.tags_score(turns[-1].text, native=native, reasoning=reasoning)


def mean_over_turns(
    score: Callable[..., float], task: Task, turns: Sequence[PlayedTurn], **style: bool
) -> float:
    """Mean of `format_score` or `tags_score` over all turns."""
    return answers.mean([score(turn.text, **style) for turn in turns])


def successful_results(turn: PlayedTurn) -> list[str]:
    """The results of the successful calls of a turn; errors are not results."""
    return [call.result.shown for call in turn.calls if call.result.success]


def _has_answer(task: Task, turn: PlayedTurn) -> bool:
    return any(answers.contains_answer(text, task.answers) for text in successful_results(turn))

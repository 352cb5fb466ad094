"""FrozenLake as text: cross the ice without falling into a hole, one move per turn.

    user       Cross the ice from @ to G. . is ice, O is a hole.
               @ . . O
               …
               Move: <move>left</move>, right, up or down.
    assistant  <move>right</move>
    user       . @ . O …

The rules are those of Gymnasium's FrozenLake; each map is random and has a safe path to the goal.
A turn is rewarded for the change in the length of the shortest safe path to the goal.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ...config.schema import PositiveInt, Share
from ...errors import ConfigError
from ...tools import Tool
from ...types import Message, Task
from ..base import Demonstration, Outcome, Reward, Split, Step
from ..rewards.answers import read_tag

Cell = tuple[int, int]
MOVES: dict[str, Cell] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
PROGRESS_REWARD = 0.2
"""For each step closer to the goal; its negative for each step away."""
MALFORMED_REWARD = -0.1
_HELP = "Move: <move>left</move>, right, up or down."


@dataclass(frozen=True, slots=True, kw_only=True)
class Lake:
    """A square map with the start top left and the goal bottom right.

    Attributes:
        steps: length of the shortest safe path to the goal, for each cell that has one.
    """

    size: int
    holes: frozenset[Cell]
    steps: dict[Cell, int]

    @property
    def goal(self) -> Cell:
        return (self.size - 1, self.size - 1)

    def moved(self, cell: Cell, move: str) -> Cell:
        """The cell after a move; a move over the edge has no effect."""
        row, column = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
        return (min(max(row, 0), self.size - 1), min(max(column, 0), self.size - 1))

    def show(self, agent: Cell) -> str:
        return "\n".join(
            " ".join(self._sign((row, column), agent) for column in range(self.size))
            for row in range(self.size)
        )

    def _sign(self, cell: Cell, agent: Cell) -> str:
        if cell == agent:
            return "@"
        return "O" if cell in self.holes else "G" if cell == self.goal else "."


def draw_lake(rng: random.Random, size: int, holes: float) -> Lake:
    """Draw maps until one has a safe path to the goal."""
    cells = [(row, column) for row in range(size) for column in range(size)]
    while True:
        drawn = frozenset(cell for cell in cells[1:-1] if rng.random() < holes)
        lake = make_lake(size, drawn)
        if (0, 0) in lake.steps:
            return lake


def make_lake(size: int, holes: frozenset[Cell]) -> Lake:
    """The lake with these holes; it need not have a safe path from the start."""
    goal = (size - 1, size - 1)
    steps, queue = {goal: 0}, deque([goal])
    while queue:
        row, column = queue.popleft()
        for down, right in MOVES.values():
            cell = (row + down, column + right)
            inside = 0 <= cell[0] < size and 0 <= cell[1] < size
            if inside and cell not in holes and cell not in steps:
                steps[cell] = steps[row, column] + 1
                queue.append(cell)
    return Lake(size=size, holes=holes, steps=steps)


class FrozenLakeEnv:
    """Random lakes to cross.

    Args:
        seed: seed of the maps and the slips; no map of eval occurs in train.
        size: cells per side.
        holes: share of the cells that are holes.
        slip: probability that the agent moves to one of the two sides instead, each equally likely.
        train_tasks, eval_tasks: maps per split.
        demos: number of demonstrations; half of their moves are random safe moves.
    """

    tools: Sequence[Tool] = ()
    native_calls = False
    rewards: Sequence[Reward] = ()

    def __init__(
        self,
        *,
        seed: int = 0,
        size: Annotated[int, Field(ge=2, le=12)] = 4,
        holes: Annotated[float, Field(ge=0, le=0.6)] = 0.2,
        slip: Share = 0.0,
        train_tasks: PositiveInt = 2048,
        eval_tasks: PositiveInt = 128,
        demos: PositiveInt = 4000,
    ) -> None:
        self._seed = seed
        self._size, self._holes, self._slip = size, holes, slip
        self._demos = demos
        train = self._draw("train", train_tasks, frozenset())
        train_maps = frozenset(task.data["lake"].holes for task in train)
        held_out = self._draw("eval", eval_tasks, train_maps)
        self._tasks: dict[Split, tuple[Task, ...]] = {"train": train, "eval": held_out}

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def episode(self, task: Task) -> FrozenLakeEpisode:
        return FrozenLakeEpisode(task, self._slip)

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """Crossings of other lakes, which teach the format of a move and little skill."""
        rng = random.Random(f"turnfast frozen lake demonstrations {seed}")
        return [
            _demonstrate(draw_lake(rng, self._size, self._holes), rng) for _ in range(self._demos)
        ]

    def corpus(self) -> Sequence[str]:
        return [
            f"{message['role']}\n{message['content']}"
            for demonstration in self.demonstrations(self._seed)[:500]
            for message in demonstration.messages
        ]

    def _draw(self, split: Split, count: int, taken: frozenset) -> tuple[Task, ...]:
        rng = random.Random(f"turnfast frozen lake {self._seed} {split}")
        tasks: list[Task] = []
        for _ in range(50 * count):
            lake = draw_lake(rng, self._size, self._holes)
            if lake.holes not in taken:
                number = len(tasks)
                data = {"lake": lake, "seed": f"{self._seed} {split} {number}"}
                tasks.append(Task(id=f"{split}-{number}", question=first_text(lake), data=data))
            if len(tasks) == count:
                return tuple(tasks)
        raise ConfigError(
            f"env.options.size: {self._size} x {self._size} cells allow fewer than {count} lakes "
            f"in {split!r} that occur in no other split; raise it, or lower {split}_tasks"
        )


class FrozenLakeEpisode:
    """One crossing; slips depend on the task's seed and are equal for all rollouts of a group."""

    def __init__(self, task: Task, slip: float) -> None:
        self._slip = slip
        self._task = task
        self._lake: Lake = task.data["lake"]
        self._rng = random.Random(task.data["seed"])
        self._agent: Cell = (0, 0)
        self._num_moves = 0

    async def start(self) -> Sequence[Message]:
        return [{"role": "user", "content": self._task.question}]

    async def step(self, text: str) -> Step:
        move = read_move(text)
        if move is None:
            return Step(
                messages=({"role": "user", "content": _HELP},),
                reward=MALFORMED_REWARD,
                reward_parts={"malformed": MALFORMED_REWARD},
                tool_calls=1,
            )
        lake, before = self._lake, self._agent
        self._agent = lake.moved(before, self._slipped(move))
        self._num_moves += 1
        fallen = self._agent in lake.holes
        done = fallen or self._agent == lake.goal
        progress = 0 if fallen else lake.steps[before] - lake.steps[self._agent]
        reward = PROGRESS_REWARD * progress
        return Step(
            messages=() if done else ({"role": "user", "content": lake.show(self._agent)},),
            reward=reward,
            reward_parts={"progress": reward},
            tool_calls=1,
            tool_successes=1,
            done=done,
        )

    async def finish(self) -> Outcome:
        at_goal = float(self._agent == self._lake.goal)
        return Outcome(
            reward=at_goal,
            reward_parts={"goal": at_goal},
            metrics={
                "exact_match": at_goal,
                "fallen": float(self._agent in self._lake.holes),
                "moves": float(self._num_moves),
            },
        )

    def _slipped(self, move: str) -> str:
        # drawn at every move, so that a slip does not depend on earlier moves
        chance, side = self._rng.random(), self._rng.random() < 0.5
        if chance >= self._slip:
            return move
        return (("up", "down") if move in ("left", "right") else ("left", "right"))[side]


def first_text(lake: Lake) -> str:
    return f"Cross the ice from @ to G. . is ice, O is a hole.\n{lake.show((0, 0))}\n{_HELP}"


def read_move(text: str) -> str | None:
    """The last move of a turn outside of its reasoning; None without a valid one."""
    move = (read_tag(text, "move") or "").lower()
    return move if move in MOVES else None


def _demonstrate(lake: Lake, rng: random.Random) -> Demonstration:
    messages: list[Message] = [{"role": "user", "content": first_text(lake)}]
    agent: Cell = (0, 0)
    for _ in range(3 * lake.size):
        safe = [move for move in MOVES if lake.moved(agent, move) in lake.steps]
        nearer = [m for m in safe if lake.steps[lake.moved(agent, m)] < lake.steps[agent]]
        move = rng.choice(nearer if rng.random() < 0.5 else safe)
        agent = lake.moved(agent, move)
        messages.append({"role": "assistant", "content": f"<move>{move}</move>"})
        if agent == lake.goal:
            break
        messages.append({"role": "user", "content": lake.show(agent)})
    else:
        messages.pop()
    return Demonstration(messages=tuple(messages))

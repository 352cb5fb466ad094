"""The lookup world: questions that need a search in invented facts, and a search tool.

It needs no download. Nothing leaks from training into evaluation:

- Facts are drawn from a seed and names are invented (world.py), so no model knows them beforehand.
  One exception is deliberate: a share `popular` of the training questions comes from a small fixed
  set whose answers the warm start memorises. Answering those from memory is rewarded, as it is for
  a pretrained model and well-known facts.
- The questions, facts and answers of the split "eval" concern entities that occur in no training
  question, in no demonstration, and not in the tokenizer's training text.
- The corpus contains distractors: sentences with the words of a fact and a wrong name.

Example, one hop::

    user       Who is the author of Sorime?
               Tool: search(query)
    assistant  <tool>{"name": "search", "args": {"query": "author of Sorime"}}</tool>
    user       <result>The author of Sorime is Bela Koru.</result>
    assistant  <answer>Bela Koru</answer>
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ...config.schema import PositiveInt, Share
from ...errors import ConfigError
from ...tools import SearchIndex, tool
from ...types import Message, Task
from ..base import Demonstration, PlayedTurn, Reward, Split
from ..rewards.answers import contains_answer
from ..rewards.functions import successful_results
from ..tool_env import ToolEnv
from .demos import DEFAULT_DEMOS, DemoOptions, write_demonstrations
from .world import (
    SYLLABLE,
    NameMaker,
    Question,
    Region,
    TrainingPart,
    distinct_questions,
    make_region,
)

Hops = Annotated[int, Field(ge=1, le=4)]


class LookupEnv(ToolEnv):
    """Questions of one to four hops over a seeded world of people, places, works and trades.

    Args:
        seed: seed of the world and the questions.
        hops: hops per question, one number or several to draw from.
        people: people in the training part; the number of works, places and trades follows.
        held_out_people: people in the held-out part.
        aliased: share of the people with a second name, used in half of the sentences and
            questions about them; both names are accepted as answers.
        inverted: share of the sentences that state the answer first.
        popular: share of the training questions that are popular.
        popular_questions: size of the popular set.
        train_tasks, eval_tasks: questions per split; those of eval are all different.
        reward_hops: pay `answer_in_result` per hop, when a result first contains the entity that
            the hop leads to; by default, as in the paper, only for the final answer.
        spelling: "syllables" makes each syllable of a name one token of the built-in model;
            "learned" lets its tokenizer decide.
        prompt: "short" names the tool in four words, for the built-in model after its warm start;
            "full" explains tools and format, for other models.
        demos: the mixture of demonstrations.
        reasoning, options: as in `ToolEnv`.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        hops: Hops | list[Hops] = 1,
        people: Annotated[int, Field(ge=16, le=100_000)] = 600,
        held_out_people: Annotated[int, Field(ge=16, le=100_000)] = 200,
        aliased: Share = 0.1,
        inverted: Share = 0.0,
        popular: Share = 0.25,
        popular_questions: PositiveInt = 64,
        train_tasks: PositiveInt = 4096,
        eval_tasks: PositiveInt = 256,
        reward_hops: bool = False,
        spelling: Literal["learned", "syllables"] = "learned",
        prompt: Literal["short", "full"] = "short",
        demos: DemoOptions = DEFAULT_DEMOS,
        reasoning: bool = False,
        **options: Any,
    ) -> None:
        self._reward_hops = reward_hops  # `default_rewards` reads it
        super().__init__(reasoning=reasoning, **options)
        hops_choices = (hops,) if isinstance(hops, int) else tuple(hops)
        if not hops_choices:
            raise ConfigError("env.options.hops: the list is empty; give numbers from 1 to 4")
        self._seed = seed
        self._prompt = prompt
        self._demos = demos
        self.token_cut = SYLLABLE if spelling == "syllables" else None
        names = NameMaker(self._rng("names"))
        style = {"aliased": aliased, "inverted": inverted}
        region = make_region(self._rng("train"), names, people=people, **style)
        self.held_out: Region = make_region(
            self._rng("held-out"), names, people=held_out_people, **style
        )
        # a title names the subject: a match there weighs more than one in the sentence
        self.index = SearchIndex(region.passages() + self.held_out.passages(), title_weight=3.0)
        self.training = TrainingPart(
            region=region,
            names=names,
            hops=hops_choices,
            popular=distinct_questions(
                self._rng("popular"), region, hops_choices, popular_questions
            ),
            popular_share=popular,
        )
        self._tasks: dict[Split, tuple[Task, ...]] = {
            "train": self._draw_train(train_tasks),
            "eval": self._draw_eval(eval_tasks),
        }

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    @tool
    def search(self, query: str) -> str:
        """Find the passage that matches a query best.

        Args:
            query: words to look for.
        """
        return "".join(hit.text for hit in self.index.search(query))

    def set_limits(self, *, max_turns: int, tool_timeout_s: float) -> None:
        most = max(self.training.hops)
        if max_turns <= most:
            raise ConfigError(
                f"env.max_turns: {max_turns} leaves no turn for the answer after the {most} "
                f"searches that env.options.hops requires; set it to {most + 1} or more"
            )
        super().set_limits(max_turns=max_turns, tool_timeout_s=tool_timeout_s)

    def first_messages(self, task: Task) -> list[Message]:
        if self._prompt == "full":
            return super().first_messages(task)
        return [{"role": "user", "content": f"{task.question}\nTool: search(query)"}]

    def default_rewards(self) -> tuple[Reward, ...]:
        changed = {"answer_in_result": _new_hop_in_result} if self._reward_hops else {}
        return tuple(
            replace(reward, function=changed.get(reward.name, reward.function))
            for reward in super().default_rewards()
        )

    def metrics(
        self, task: Task, answer: str | None, turns: Sequence[PlayedTurn]
    ) -> Mapping[str, float]:
        """Those of `ToolEnv`, and exact match by kind of question, popular or rare."""
        kind = "popular" if task.data["popular"] else "rare"
        metrics = super().metrics(task, answer, turns)
        return {**metrics, f"exact_match_{kind}": metrics["exact_match"]}

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """Conversations for the warm start, in random order; see `DemoOptions`."""
        return write_demonstrations(self, self.training, self._demos, seed)

    def corpus(self) -> Sequence[str]:
        """Every sentence of the training part and every text of the demonstrations, each once:
        otherwise the tokenizer would give frequent names fewer tokens than others."""
        texts = dict.fromkeys(passage.text for passage in self.training.region.passages())
        for demonstration in self.demonstrations(self._seed):
            for message in demonstration.messages:
                texts[f"{message['role']}\n{message['content']}"] = None
        return list(texts)

    def _rng(self, purpose: str) -> random.Random:
        # Random hashes a text seed itself: the same on every machine and Python version
        return random.Random(f"turnfast lookup {self._seed} {purpose}")

    def _draw_train(self, count: int) -> tuple[Task, ...]:
        rng = self._rng("train questions")
        drawn = [self.training.draw(rng, self.training.popular_share) for _ in range(count)]
        return tuple(_task(f"train-{i}", q, popular=p) for i, (q, p) in enumerate(drawn))

    def _draw_eval(self, count: int) -> tuple[Task, ...]:
        rng = self._rng("eval questions")
        by_text = distinct_questions(rng, self.held_out, self.training.hops, count)
        questions = list(by_text.values())
        rng.shuffle(questions)
        return tuple(_task(f"eval-{i}", q, popular=False) for i, q in enumerate(questions))


def _task(task_id: str, question: Question, *, popular: bool) -> Task:
    data: dict[str, Any] = {
        "popular": popular,
        "hops": len(question.facts),
        "entities": tuple(entity.name for entity in question.entities),
        "targets": tuple(fact.object.names for fact in question.facts),
    }
    return Task(id=task_id, question=question.text, answers=question.answers, data=data)


def _new_hop_in_result(task: Task, turns: Sequence[PlayedTurn]) -> float:
    """1.0 if a result of the last turn contains the target of a hop for the first time."""
    return float(bool(_hops_found(task, turns[-1:]) - _hops_found(task, turns[:-1])))


def _hops_found(task: Task, turns: Sequence[PlayedTurn]) -> set[int]:
    """The hops whose target occurs in a result of these turns."""
    texts = [text for turn in turns for text in successful_results(turn)]
    return {
        hop
        for hop, names in enumerate(task.data["targets"])
        if any(contains_answer(text, names) for text in texts)
    }

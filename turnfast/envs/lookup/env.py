"""The built-in world: questions whose answers must be looked up, and a search tool to do so.

It needs no download, and is honest in three ways:

- Nothing can be known beforehand: facts are drawn from a seed (world.py), names are invented. The
  exception is stated: a share `popular` of the training questions comes from a small fixed set
  whose answers the warm start memorises, so that answering from memory pays there, as it does for
  a real model and famous facts.
- The split "eval" is a real test: its questions, chains and answers are about entities that occur
  in no training question, no demonstration, and not in the text the tokenizer is trained on. (A
  share `eval_popular` of it may be set aside for popular questions; it is 0 unless asked for.)
- The corpus has false friends, sentences with the words of a fact and a wrong name.

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
from typing import Annotated, Any, Literal

from pydantic import Field

from ...config.schema import PositiveInt, Share
from ...errors import ConfigError
from ...tools import SearchIndex, tool
from ...types import Message, Task
from ..base import Demonstration, Split
from ..rewards.answers import contains_answer
from ..tool_env import PlayedTurn, ToolEnv
from .demos import Mixture, write_demonstrations
from .world import SYLLABLE, NameMaker, Question, Region, make_region

Hops = Annotated[int, Field(ge=1, le=4)]


class LookupEnv(ToolEnv):
    """Questions of one to four hops over a seeded world of people, places, works and trades.

    Args:
        seed: draws the world, the questions and nothing else.
        hops: hops of a question, one number or several to draw from.
        people: people of the training part; works, places and trades follow from it.
        held_out_people: people of the held-out part.
        aliased: share of the people with a second name, by which half of the sentences and
            questions call them; both names are accepted as answers.
        inverted: share of the sentences with the answer in front.
        distractors: false friends per fact.
        reward_hops: pay `answer_in_result` for each hop, when a result first names the entity that
            it leads to; otherwise, as in the paper, only for the final answer.
        popular: share of the training questions that are popular.
        popular_questions: size of the popular set.
        eval_popular: share of the eval questions that are popular instead of held out.
        train_tasks, eval_tasks: questions per split; those of eval are all different.
        top_k: passages that a search returns, one per line.
        spelling: "learned" leaves to the tokenizer of the built-in model how it spells names; with
            "syllables" each syllable of a name is one token.
        prompt: "short" names the tool in four words, for the small model that has seen
            demonstrations; "full" explains tools and format to a model that has not.
        demos: number of demonstrations.
        demo_calls: share of the question demonstrations that call the tool.
        demo_malformed: share of the calls that are malformed; the error is shown, and the answer
            then comes from memory.
        demo_copied: share of the well-formed calls whose result the answer is copied from; after
            the others it comes from memory.
        demo_popular_passes: demonstrations per popular question that answer it, rightly, at once.
        demo_reading: share of all demonstrations that are reading exercises, a made-up sentence
            with a question on it: they teach to copy, not to search.
        demo_walks: share of all demonstrations that are walks, questions taken apart hop by hop in
            plain words: they teach what to ask next, not to search.
        demo_echo: share of all demonstrations in which a list of made-up names is repeated.
        demo_recall_after_call: share of the calls on popular questions after which the answer is
            still remembered, where it is not copied; after the others it is a guess, as if the
            exchange had driven it out.
        demo_spaced: write "<answer> Ulm", as a byte-level tokenizer then spells the answer with the
            same tokens as the sentence it is copied from; scoring ignores the space.
        reasoning, options: those of `ToolEnv`.

    "From memory" is right for popular questions (after a call as `demo_recall_after_call` says),
    and otherwise a random name of the right kind.
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
        distractors: Share = 0.3,
        popular: Share = 0.25,
        popular_questions: PositiveInt = 64,
        eval_popular: Share = 0.0,
        train_tasks: PositiveInt = 4096,
        eval_tasks: PositiveInt = 256,
        top_k: Annotated[int, Field(ge=1, le=100)] = 1,
        reward_hops: bool = False,
        spelling: Literal["learned", "syllables"] = "learned",
        prompt: Literal["short", "full"] = "short",
        demos: PositiveInt = 12_000,
        demo_calls: Share = 0.3,
        demo_malformed: Share = 0.4,
        demo_copied: Share = 0.35,
        demo_popular_passes: Annotated[int, Field(ge=0)] = 40,
        demo_reading: Share = 0.1,
        demo_walks: Share = 0.0,
        demo_echo: Share = 0.1,
        demo_recall_after_call: Share = 0.0,
        demo_spaced: bool = True,
        reasoning: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(reasoning=reasoning, **options)
        self.hops: tuple[int, ...] = (hops,) if isinstance(hops, int) else tuple(hops)
        if not self.hops:
            raise ConfigError("env.options.hops: an empty list; give 1 to 4, or some of them")
        self.mixture = Mixture(
            count=demos,
            calls=demo_calls,
            malformed=demo_malformed,
            copied=demo_copied,
            popular=popular,
            popular_passes=demo_popular_passes,
            reading=demo_reading,
            walks=demo_walks,
            echo=demo_echo,
            recall_after_call=demo_recall_after_call,
            spaced=demo_spaced,
        )
        self._seed = seed
        self._top_k = top_k
        self._reward_hops = reward_hops
        self._prompt = prompt
        self.token_cut = SYLLABLE if spelling == "syllables" else None
        names = NameMaker(self._rng("names"))
        style = {"aliased": aliased, "inverted": inverted, "distractors": distractors}
        self.region: Region = make_region(self._rng("train"), names, people=people, **style)
        self.held_out: Region = make_region(
            self._rng("held-out"), names, people=held_out_people, **style
        )
        self.names = names
        passages = self.region.passages() + self.held_out.passages()
        # titles name the subject: whom a sentence is about counts for more than who is in it
        self.index = SearchIndex(passages, title_weight=3.0)
        self.popular: tuple[Question, ...] = _different(
            self._rng("popular"), self.region, self.hops, popular_questions
        )
        self._tasks: dict[Split, tuple[Task, ...]] = {
            "train": self._draw_train(train_tasks, popular),
            "eval": self._draw_eval(eval_tasks, eval_popular),
        }

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    @tool(inline=True)
    def search(self, query: str) -> str:
        """Find the passage that matches a query best.

        Args:
            query: words to look for.
        """
        return "\n".join(hit.text for hit in self.index.search(query, self._top_k))

    def set_limits(self, *, max_turns: int, tool_timeout_s: float) -> None:
        most = max(self.hops)
        if max_turns <= most:
            raise ConfigError(
                f"env.max_turns: {max_turns} leaves no turn for the answer after the {most} "
                f"searches that env.options.hops asks for; set it to {most + 1} or more"
            )
        super().set_limits(max_turns=max_turns, tool_timeout_s=tool_timeout_s)

    def first_messages(self, task: Task) -> list[Message]:
        if self._prompt == "full":
            return super().first_messages(task)
        return [{"role": "user", "content": f"{task.question}\nTool: search(query)"}]

    def score_turn(
        self, task: Task, turn: PlayedTurn, earlier: Sequence[PlayedTurn]
    ) -> Mapping[str, float]:
        parts = super().score_turn(task, turn, earlier)
        if not self._reward_hops:
            return parts
        targets: tuple[tuple[str, ...], ...] = task.data["targets"]
        found = _found(targets, [turn]) - _found(targets, earlier)
        return {**parts, "answer_in_result": float(bool(found))}

    def metrics(
        self, task: Task, answer: str | None, turns: Sequence[PlayedTurn]
    ) -> Mapping[str, float]:
        """Those of `ToolEnv`, and exact match once more under the kind of question: a figure that
        a popular question does not have is left out there, not counted as 0."""
        kind = "popular" if task.data["popular"] else "rare"
        figures = super().metrics(task, answer, turns)
        return {**figures, f"exact_match_{kind}": figures["exact_match"]}

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """Conversations for the warm start, in random order; see `Mixture`."""
        return write_demonstrations(self, self.mixture, seed)

    def corpus(self) -> Sequence[str]:
        """Every sentence of the training part, and every text of the demonstrations, each once: a
        name that is asked for often must not be spelt with fewer tokens than others."""
        texts = dict.fromkeys(passage.text for passage in self.region.passages())
        for demonstration in self.demonstrations(self._seed):
            for message in demonstration.messages:
                texts[f"{message['role']}\n{message['content']}"] = None
        return list(texts)

    def _rng(self, purpose: str) -> random.Random:
        # seeded with text, which random hashes itself: the same on every machine and version
        return random.Random(f"turnfast lookup {self._seed} {purpose}")

    def _draw_train(self, count: int, popular: float) -> tuple[Task, ...]:
        rng = self._rng("train questions")
        famous = {question.text for question in self.popular}
        tasks: list[Task] = []
        for i in range(count):
            if rng.random() < popular:
                tasks.append(_task(f"train-{i}", rng.choice(self.popular), popular=True))
                continue
            question = self.region.ask(rng, rng.choice(self.hops))
            while question.text in famous:
                question = self.region.ask(rng, rng.choice(self.hops))
            tasks.append(_task(f"train-{i}", question, popular=False))
        return tuple(tasks)

    def _draw_eval(self, count: int, popular: float) -> tuple[Task, ...]:
        rng = self._rng("eval questions")
        num_popular = min(round(popular * count), len(self.popular))
        known = rng.sample(self.popular, num_popular)
        unknown = _different(rng, self.held_out, self.hops, count - num_popular)
        mixed = [(question, True) for question in known] + [(q, False) for q in unknown]
        rng.shuffle(mixed)
        return tuple(_task(f"eval-{i}", q, popular=p) for i, (q, p) in enumerate(mixed))


def _task(name: str, question: Question, *, popular: bool) -> Task:
    data: dict[str, Any] = {
        "popular": popular,
        "hops": len(question.facts),
        "entities": tuple(entity.name for entity in question.entities),
        "targets": tuple(fact.object.names for fact in question.facts),
    }
    return Task(id=name, question=question.text, answers=question.answers, data=data)


def _found(targets: Sequence[tuple[str, ...]], turns: Sequence[PlayedTurn]) -> set[int]:
    """The hops whose target some result of these turns names."""
    texts = [call.result.shown for turn in turns for call in turn.calls if call.result.success]
    return {
        hop
        for hop, names in enumerate(targets)
        if any(contains_answer(text, names) for text in texts)
    }


def _different(
    rng: random.Random, region: Region, hops: Sequence[int], count: int
) -> tuple[Question, ...]:
    """So many questions, all different; raises ConfigError where the world is too small."""
    found: dict[str, Question] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        question = region.ask(rng, rng.choice(hops))
        found.setdefault(question.text, question)
    else:
        raise ConfigError(
            f"env.options.people: the world is too small for {count} different questions; give it "
            "more people (or held_out_people), or ask for fewer eval_tasks or popular_questions"
        )
    return tuple(found.values())

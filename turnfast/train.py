"""The training loop: rollout, credit, packing, update, weight sync."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from .config.schema import Config
from .credit import assign_credits, spread_sums
from .errors import Interrupted, OutOfMemory, RolloutError, SyncError, TrainingError
from .evaluate import evaluate
from .metrics.reduce import Max, Metrics, reduce_metrics, to_plain
from .metrics.rewards import diagnose
from .metrics.rollouts import summarise
from .metrics.stopwatch import Stopwatch
from .model.architecture import attention_span_of
from .packing.options import PackOptions
from .packing.pack import Packed, pack_step, trainable_rows
from .packing.rows import join_ranks
from .parallel.ranks import open_ranks
from .report import write_report
from .report.console import Progress
from .rollout.collect import Collector
from .rollout.groups import CollectedGroups
from .run import Run, is_due, open_run, training_state
from .rundir.checkpoint import save_checkpoint
from .sampler import choose_backend
from .sampler.sync import check_logprob_gap, sync_after_step, sync_weights
from .types import Batch, Credit, Group
from .update.memory import explain_out_of_memory, smaller_microbatches
from .update.reference import with_reference
from .update.update import Gap, Update, needs_every_token, update

FAULTS = (RolloutError, OutOfMemory, TrainingError, SyncError)
"""Errors that end a step and leave the weights consistent."""


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `train.steps` steps are done or `should_stop` returns True.

    Both ends leave a checkpoint and a report.

    Raises:
        RolloutError, OutOfMemory, TrainingError, SyncError: after a checkpoint of the completed
            steps. It contains the updates of the failed step that came before the error.
        ConfigError, TornStep, RankError, CheckpointError: without a checkpoint.
    """
    with (
        open_ranks(timeout_s=2 * config.rollout.step_timeout_s) as ranks,
        open_run(config, run_dir, resume=resume, ranks=ranks) as run,
        _open_progress(run) as progress,
        _open_collector(run, should_stop) as collector,
    ):
        loop = TrainingLoop(run, collector, progress, should_stop)
        try:
            loop.start()
            for step in range(run.first_step, config.train.steps + 1):
                collected = loop.roll_out(step)
                credits = loop.give_credit(collected.groups)
                packed = loop.pack(collected.groups, credits)
                updated = loop.update(packed)
                sync_gap = loop.sync()
                loop.log(collected, credits, packed, updated, sync_gap)
                if is_due(step, config.train.eval_every, config.train.steps):
                    loop.evaluate()
                if is_due(step, config.train.save_every, config.train.steps):
                    loop.save()
        except Interrupted:
            loop.save()  # --resume repeats the interrupted step with the same prompts and seeds
        except FAULTS:
            if loop.step >= run.first_step:
                loop.save()
            raise
        if ranks.is_leader and run.directory.metrics.exists():
            write_report(run_dir)


class TrainingLoop:
    """The stages of a training step. All ranks call each stage at the same time.

    Attributes:
        step: the last step whose update is done; a checkpoint holds the state after it.
    """

    def __init__(
        self,
        run: Run,
        collector: Collector,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.step = run.first_step - 1
        self._run, self._config, self._ranks = run, run.config, run.ranks
        self._policy, self._critic = run.learner.policy, run.learner.critic
        self._collector, self._progress, self._should_stop = collector, progress, should_stop
        self._clock = Stopwatch(synchronize=self._policy.synchronize)
        self._memory_advice = smaller_microbatches(
            "train.tokens_per_microbatch",
            run.config.train.tokens_per_microbatch,
            least=run.config.rollout.max_context,
            checkpointing=run.config.model.checkpointing,
        )

    def start(self) -> None:
        """Load the weights into the sampler; evaluate them unless an earlier run has."""
        run = self._run
        with self._ranks.share_errors():
            sync_weights(self._policy.model, run.setup.sampler, run.probe, run.tolerance)
        if not run.evaluated:
            self.evaluate()

    def roll_out(self, step: int) -> CollectedGroups:
        """Collect this rank's groups of a step."""
        self._clock.lap()
        with self._clock.phase("rollout"), self._ranks.share_errors():
            if self._should_stop():
                raise Interrupted
            return self._collector.collect(step)

    def give_credit(self, groups: Sequence[Group]) -> list[Credit]:
        """Compute the advantages of every turn, with the critic's values if there is one."""
        train, credit, values = self._config.train, self._config.credit, None
        with self._clock.phase("score"), self._ranks.share_errors():
            if self._critic is not None:
                with explain_out_of_memory(OutOfMemory, self._memory_advice):
                    values = self._critic.values(
                        self._policy,
                        groups,
                        tokens_per_microbatch=train.tokens_per_microbatch,
                        share_prefixes=train.share_prefixes,
                    )
            sums = spread_sums(groups, credit.rule, **credit.options)
        with self._clock.phase("score"):
            sums = self._ranks.sum(sums)
            with self._ranks.share_errors():
                return assign_credits(
                    groups, credit.rule, values=values, sums=sums, **credit.options
                )

    def pack(self, groups: Sequence[Group], credits: Sequence[Credit]) -> Packed:
        """Pack this rank's share of the rows of all ranks."""
        config, ranks = self._config, self._ranks
        options = PackOptions(
            normalizer=config.loss.normalizer,
            constant=config.rollout.max_new_tokens * config.env.max_turns,
            share_prefixes=config.train.share_prefixes,
            # the critic learns from tokens without an advantage too
            drop_idle=not needs_every_token(config.loss) and self._critic is None,
            whole_trajectories=config.loss.ratio == "sequence",
            attention_span=attention_span_of(self._policy.model),
        )
        with self._clock.phase("pack"):
            with ranks.share_errors():
                own_rows = trainable_rows(groups, credits)
            rows = join_ranks(ranks.all_gather_arrays(own_rows.arrays()))
            with ranks.share_errors():
                return pack_step(
                    rows,
                    budget=config.train.tokens_per_microbatch,
                    options=options,
                    device=self._policy.device,
                    rank=ranks.rank,
                    num_ranks=ranks.size,
                )

    def update(self, packed: Packed) -> Update:
        """Take the optimizer steps of a training step; then this step counts as done."""
        run, advice = self._run, self._memory_advice
        loss, temperature = self._config.loss, self._config.rollout.temperature
        batches: Sequence[Batch] = packed.batches
        with self._clock.phase("train"):
            if run.reference is not None:
                with self._ranks.share_errors(), explain_out_of_memory(OutOfMemory, advice):
                    batches = with_reference(batches, run.reference, loss, temperature=temperature)
            updated = update(
                run.learner,
                batches,
                loss,
                temperature=temperature,
                num_updates=self._config.train.updates_per_step,
                check_gap=self._check_gap,
                memory_advice=advice,
            )
        self.step += 1
        return updated

    def sync(self) -> float:
        """Load the new weights, the same on all ranks, into the sampler; see `sync_after_step`."""
        run, train, model = self._run, self._config.train, self._policy.model
        probed = train.overlap or is_due(self.step, train.eval_every, train.steps)
        with self._clock.phase("rollout"):
            self._collector.wait()
        with self._clock.phase("sync"), self._ranks.share_errors():
            gap = sync_after_step(model, run.setup.sampler, run.probe, run.tolerance, probed=probed)
        self._ranks.check_equal_weights(model.parameters())
        return gap

    def log(
        self,
        collected: CollectedGroups,
        credits: Sequence[Credit],
        packed: Packed,
        updated: Update,
        sync_gap: float,
    ) -> None:
        """Log the metrics and some of the rollouts of a step."""
        times = self._clock.lap()
        metrics = {
            **summarise(collected.groups, credits),
            **diagnose(collected.groups, credits),
            **collected.metrics(),
            **packed.metrics(),
            **updated.metrics(),
            "sync_gap": Max(sync_gap),
            **times,
        }
        self._log_metrics(metrics)
        shown = collected.groups[: self._config.train.log_rollouts]
        self._run.directory.log_rollouts(self.step, shown, credits)

    def evaluate(self) -> None:
        """Evaluate on held-out tasks, if the environment has any, and log the result."""
        run, train = self._run, self._config.train
        if not run.setup.env.tasks("eval"):
            return
        with self._ranks.share_errors():
            metrics, groups = evaluate(
                run.setup, train.eval_tasks, should_stop=self._should_stop, ranks=self._ranks
            )
        self._log_metrics(metrics)
        run.directory.log_rollouts(self.step, groups[: train.log_rollouts], split="eval")

    def save(self) -> None:
        """Save a checkpoint of the last completed step."""
        progress = {"kind": "train", **self._collector.state(self.step)}
        with self._ranks.share_errors():
            if self._ranks.is_leader:
                save_checkpoint(
                    self._run.directory.checkpoints,
                    self.step,
                    training_state(self._run.learner),
                    progress=progress,
                    keep=self._config.train.keep_checkpoints,
                )

    def _check_gap(self, gap: Gap) -> None:
        """Check the sampled tokens' log-probs, which verifies the last weight sync."""
        if self._config.train.overlap:
            return  # they come from older weights; a probe has verified the sync
        dtype = self._policy.model.dtype
        check_logprob_gap(gap.mean, gap.largest, tolerance=self._run.tolerance, dtype=dtype)

    def _log_metrics(self, metrics: Metrics) -> None:
        values = reduce_metrics(self._ranks.all_gather(to_plain(metrics)))
        self._run.directory.log(self.step, values)
        self._progress.step(self.step, values)


def _open_progress(run: Run) -> Progress:
    # only rank 0 prints
    stream = None if run.ranks.is_leader else io.StringIO()
    steps = run.config.train.steps
    progress = Progress(run.directory.path, steps, done=run.first_step - 1, stream=stream)
    progress.note(
        f"sampler  {choose_backend(run.config.sampler)} on {run.learner.policy.device.type}, "
        f"{run.setup.sampler.capacity} rollouts at a time"
    )
    return progress


def _open_collector(run: Run, should_stop: Callable[[], bool]) -> Collector:
    return Collector(
        run.setup,
        run.prompts,
        run.config.train,
        run.config.credit,
        first_step=run.first_step,
        should_stop=should_stop,
        ranks=run.ranks,
    )

"""The training loop: rollout, credit, packing, update, weight sync."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from .config.schema import Config
from .credit import assign_credits
from .errors import Interrupted, OutOfMemory, RolloutError, SyncError
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
from .run import Run, is_due, open_run, training_state
from .rundir.checkpoint import save_checkpoint
from .sampler import choose_backend
from .sampler.sync import check_logprob_gap, sync_after_step, sync_weights
from .types import Batch, Credit, Group
from .update.memory import explain_out_of_memory, smaller_microbatches
from .update.reference import with_reference
from .update.update import Gap, TrainingError, Update, needs_every_token, update

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
        _progress(run) as show,
        Collector(
            run.setup,
            run.prompts,
            config.train,
            config.credit,
            first_step=run.first_step,
            should_stop=should_stop,
            ranks=run.ranks,
        ) as collector,
    ):
        synced_by = (run.learner.policy.model, run.setup.sampler, run.probe, run.tolerance)
        clock = Stopwatch(synchronize=run.learner.policy.synchronize)
        done = run.first_step - 1
        try:
            with ranks.share_errors():
                sync_weights(*synced_by)
            if not run.evaluated:
                _evaluate(run, done, show, should_stop)
            for step in range(run.first_step, config.train.steps + 1):
                clock.lap()
                with clock.phase("rollout"), ranks.share_errors():
                    if should_stop():
                        raise Interrupted
                    gathered = collector.collect(step)
                    groups = gathered.groups
                with clock.phase("score"), ranks.share_errors():
                    credits = _credit(run, groups)
                with clock.phase("pack"):
                    packed = _pack(run, groups, credits)
                with clock.phase("train"):
                    updated = _update(run, packed)
                # from here on a checkpoint holds the state after this step
                done = step
                with clock.phase("rollout"):
                    collector.wait()
                with clock.phase("sync"), ranks.share_errors():
                    evaluated = is_due(step, config.train.eval_every, config.train.steps)
                    gap = sync_after_step(*synced_by, probed=evaluated or config.train.overlap)
                ranks.check_equal_weights(run.learner.policy.model.parameters())
                times = clock.lap()
                metrics = {
                    **summarise(groups, credits),
                    **diagnose(groups, credits),
                    **gathered.metrics(),
                    **packed.metrics(),
                    **updated.metrics(),
                    "sync_gap": Max(gap),
                    **times,
                }
                _log(run, step, metrics, show)
                shown = groups[: config.train.log_rollouts]
                run.directory.log_rollouts(step, shown, credits)
                if evaluated:
                    _evaluate(run, step, show, should_stop)
                if is_due(step, config.train.save_every, config.train.steps):
                    _save(run, collector, step)
        except Interrupted:
            # --resume repeats the interrupted step with the same prompts and seeds
            _save(run, collector, done)
        except FAULTS:
            if done >= run.first_step:
                _save(run, collector, done)
            raise
        if ranks.is_leader and run.directory.metrics.exists():
            write_report(run_dir)


def _progress(run: Run) -> Progress:
    # only rank 0 prints
    stream = None if run.ranks.is_leader else io.StringIO()
    steps = run.config.train.steps
    show = Progress(run.directory.path, steps, done=run.first_step - 1, stream=stream)
    show.note(
        f"sampler  {choose_backend(run.config.sampler)} on {run.learner.policy.device.type}, "
        f"{run.setup.sampler.capacity} rollouts at a time"
    )
    return show


def _credit(run: Run, groups: Sequence[Group]) -> list[Credit]:
    config, values = run.config, None
    if run.learner.critic is not None:
        with explain_out_of_memory(OutOfMemory, _memory_advice(config)):
            values = run.learner.critic.values(
                run.learner.policy,
                groups,
                tokens_per_microbatch=config.train.tokens_per_microbatch,
                share_prefixes=config.train.share_prefixes,
            )
    return assign_credits(groups, config.credit.rule, values=values, **config.credit.options)


def _pack(run: Run, groups: Sequence[Group], credits: Sequence[Credit]) -> Packed:
    """Pack this rank's share of the rows of all ranks."""
    config, ranks = run.config, run.ranks
    options = PackOptions(
        normalizer=config.loss.normalizer,
        constant=config.rollout.max_new_tokens * config.env.max_turns,
        share_prefixes=config.train.share_prefixes,
        # the critic learns from tokens without an advantage too
        drop_idle=not needs_every_token(config.loss) and run.learner.critic is None,
        whole_trajectories=config.loss.ratio == "sequence",
        attention_span=attention_span_of(run.learner.policy.model),
    )
    with ranks.share_errors():
        own_rows = trainable_rows(groups, credits)
    rows = join_ranks(ranks.all_gather_arrays(own_rows.arrays()))
    with ranks.share_errors():
        return pack_step(
            rows,
            budget=config.train.tokens_per_microbatch,
            options=options,
            device=run.learner.policy.device,
            rank=ranks.rank,
            num_ranks=ranks.size,
        )


def _update(run: Run, packed: Packed) -> Update:
    loss, temperature = run.config.loss, run.config.rollout.temperature
    advice = _memory_advice(run.config)
    batches: Sequence[Batch] = packed.batches
    if run.reference is not None:
        with run.ranks.share_errors(), explain_out_of_memory(OutOfMemory, advice):
            batches = with_reference(batches, run.reference, loss, temperature=temperature)
    return update(
        run.learner,
        batches,
        loss,
        temperature=temperature,
        num_updates=run.config.train.updates_per_step,
        check_gap=_gap_check(run),
        memory_advice=advice,
    )


def _memory_advice(config: Config) -> str:
    return smaller_microbatches(
        "train.tokens_per_microbatch",
        config.train.tokens_per_microbatch,
        least=config.rollout.max_context,
        checkpointing=config.model.checkpointing,
    )


def _gap_check(run: Run) -> Callable[[Gap], None]:
    """The check of the sampled tokens' log-probs, which verifies the last weight sync."""
    if run.config.train.overlap:  # they come from older weights; a probe has verified the sync
        return lambda gap: None
    return lambda gap: check_logprob_gap(
        gap.mean, gap.largest, tolerance=run.tolerance, dtype=run.learner.policy.model.dtype
    )


def _log(run: Run, step: int, metrics: Metrics, show: Progress) -> None:
    values = reduce_metrics(run.ranks.all_gather(to_plain(metrics)))
    run.directory.log(step, values)
    show.step(step, values)


def _evaluate(run: Run, step: int, show: Progress, should_stop: Callable[[], bool]) -> None:
    if not run.setup.env.tasks("eval"):
        return
    num_tasks = run.config.train.eval_tasks
    with run.ranks.share_errors():
        metrics, groups = evaluate(run.setup, num_tasks, should_stop=should_stop, ranks=run.ranks)
    _log(run, step, metrics, show)
    run.directory.log_rollouts(step, groups[: run.config.train.log_rollouts], split="eval")


def _save(run: Run, collector: Collector, step: int) -> None:
    progress = {"kind": "train", **collector.state(step)}
    with run.ranks.share_errors():
        if run.ranks.is_leader:
            save_checkpoint(
                run.directory.checkpoints,
                step,
                training_state(run.learner),
                progress=progress,
                keep=run.config.train.keep_checkpoints,
            )

"""A training stage at work: its weights, its data and programs, and the loop over its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from typing_extensions import override

from tunelang.compiler.graph import StageNode
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.diagnostics.tune_error import WRONG_SPEC, FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.references import references_in
from tunelang.dsl.vocabulary.policy_stages import Policy, Ppo
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Distill, Supervised
from tunelang.dsl.vocabulary.training import Continued
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.errors import NotBuiltError
from tunelang.runtime.evals.run_evals import Evaluation, evaluate, named
from tunelang.runtime.loading.initial_weights import Origin, loaded, score_head, scoring, starting
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import merge_params, split_trainable
from tunelang.runtime.pipeline.run_context import Session, Summary
from tunelang.runtime.rewards.reward_functions import Reward
from tunelang.runtime.sharding import Layout, make_layout, shardings
from tunelang.runtime.stages.distill import compared, forget_teacher
from tunelang.runtime.stages.fused_sweep import BranchTrainer, Fused
from tunelang.runtime.stages.policy import policy_trainer
from tunelang.runtime.stages.supervised import SupervisedTrainer, supervised_trainer
from tunelang.runtime.store.run_store import StageFolder
from tunelang.runtime.training.checkpoints import Checkpoints, load_params
from tunelang.runtime.training.metrics import Recorder, open_trackers
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, initial_state
from tunelang.runtime.training.training_loop import Loop, Saving, Trainer


@dataclass(eq=False)
class OtherTokenizerError(TuneError):
    """The model that an `attribute` names, `name`, has another tokenizer than the trained one."""

    code = "other-tokenizer"
    exit_code = WRONG_SPEC
    attribute: str
    name: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.other_tokenizer(self.name)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute=self.attribute)


@dataclass
class Together:
    """What branches share that are trained side by side."""

    rates: Sequence[float]
    """The learning rate of each."""
    layout: StageLayout
    saving: Saving
    opened: tuple[Fused, Model] | None = None
    """The first of them opens it."""


@dataclass
class Job:
    """One training stage in one of its branches."""

    session: Session
    planned: StagePlan
    node: StageNode
    stage: Training
    folder: StageFolder
    evals: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the evals found last, by digest."""
    beside: Together | None = None
    """With which other branches it is trained, and its place among them."""
    at: int = 0

    @property
    def share(self) -> int:
        """How many branches use the devices."""
        return 1 if self.beside is None else len(self.beside.rates)

    @property
    def planned_layout(self) -> StageLayout:
        """Where and in which parts it runs."""
        if self.beside is not None:
            return self.beside.layout
        return self.session.prepared.layouts[self.planned.node]

    def saving(self, start: int) -> Saving:
        """Return when it is to be saved."""
        return Saving(start, self.stage.checkpoint_every, self.marks(), self.session.stopping)

    def run(self, start: int) -> Generator[None, None, Summary]:
        """Train, and wait before each call to be asked for it."""
        session, resources = self.session, self.session.resources
        begun = time.time()
        session.reporter.stage(self.planned, None)
        session.reporter.doing("opening")
        source = session.origins.of(self.node, self.stage.from_)
        model = resources.model(source.model)
        layout = make_layout(**self.planned_layout.mesh, devices=resources.devices)
        seed = session.seed(self.stage.seed)
        if start == 0:
            self.evals = {digest: dict(found) for digest, found in source.evals.items()}
        trainer, model, close = self.trainer(source, model, layout, seed, start)
        try:
            return (yield from self._train(trainer, model, layout, source, start, begun))
        finally:
            close()

    def _train(
        self,
        trainer: Trainer,
        model: Model,
        layout: Layout,
        source: Origin,
        start: int,
        begun: float,
    ) -> Generator[None, None, Summary]:
        session = self.session
        session.tell_bad_rows()
        session.reporter.stage(self.planned, trainer.steps)
        checkpoints = Checkpoints(self.folder, self.marks())
        progress: Mapping[str, Any] = {"recorder": {"sums": {}, "counts": {}}, "trainer": {}}
        try:
            if 0 < start < trainer.steps:
                state = trainer.state
                params, moments, progress = checkpoints.restore(start, state.params, state.moments)
                restored = state.restored(params, moments, self.updates(start))
                trainer.resume(restored, progress["trainer"])
            trackers = open_trackers(
                session.prepared.program.run.track, self.folder, self.planned.node, start
            )
            with Recorder(self.folder, self.stage.log_every, trainer.steps, trackers) as recorder:
                recorder.resume(progress["recorder"])
                chip = session.prepared.devices[self.planned.node].chip
                loop = Loop(
                    stage=self.stage,
                    trainer=trainer,
                    recorder=recorder,
                    checkpoints=checkpoints,
                    reporter=session.reporter,
                    evaluate=lambda params, step: self.evaluate(
                        recorder, model, params, layout, step
                    ),
                    saving=self.saving(start) if self.beside is None else self.beside.saving,
                    peak=chip.peak * layout.mesh.size / self.share,
                )
                metrics = yield from loop.run(start)
                if isinstance(self.stage, Distill):
                    forget_teacher(self.folder.path)
                    metrics |= self._compared(
                        self.stage, recorder, model, trainer.state, layout, trainer.steps
                    )
        finally:
            checkpoints.close()
        return {
            "model": source.model,
            "from": source.node,
            "steps": trainer.steps,
            "seconds": (time.time() - begun) / self.share,
            "metrics": metrics,
            "evals": self.evals,
        }

    def updates(self, step: int) -> int:
        """Return the updates of so many steps."""
        if isinstance(self.stage, Policy):
            return step * self.stage.minibatches * self.stage.passes
        return step

    def marks(self) -> frozenset[int]:
        """Return the steps of this stage that the spec refers to: `baseline.step(500)`."""
        found = set()
        for node in self.session.prepared.graph.nodes.values():
            for _, reference in references_in(node.value, ""):
                step = getattr(reference, "step", None)
                if step is not None and reference.name == self.planned.stage:
                    found.add(int(step))
        return frozenset(found)

    def trainer(
        self, source: Origin, model: Model, layout: Layout, seed: int, start: int
    ) -> tuple[Trainer, Model, Callable[[], None]]:
        """Open the stage's data and programs; returns also the model with the adapter that is
        trained, and what to call at the end.
        """
        close: Callable[[], None] = lambda: None  # noqa: E731
        if self.beside is None:
            trainer, model, close = self.opened(source, model, layout, seed)
        else:
            if self.beside.opened is None:
                first, model, _ = self.opened(source, model, layout, seed)
                assert isinstance(first, SupervisedTrainer)
                self.beside.opened = Fused(first, self.beside.rates), model
            fused, model = self.beside.opened
            trainer = BranchTrainer(fused, self.at)
        if start and start == trainer.steps:
            self.folder.forget_evals(start)
            state = trainer.state
            path = self.folder.checkpoints / str(start)
            trainer.state = replace(state, params=load_params(path, state.trained_params))
        return trainer, model, close

    def opened(
        self, source: Origin, model: Model, layout: Layout, seed: int
    ) -> tuple[Trainer, Model, Callable[[], None]]:
        """See `trainer`: from the beginning, and of one branch by itself."""
        session, resources, stage = self.session, self.session.resources, self.stage
        planned = self.planned_layout
        scale = stage.optimizer.lr
        weights = derive(seed, "weights") % 2**31
        architecture, params = starting(
            source, stage.adapter, model, layout, weights, stage.yields == "scores"
        )
        model = replace(model, architecture=architecture)

        def begin(
            optimizer: Any,
            config: StepConfig,
            extra: Any = nnx.State({}),  # noqa: B008
        ) -> TrainState:
            extra = jax.device_put(extra, shardings(extra, layout))
            whole = merge_params(params, extra)
            return initial_state(architecture, whole, optimizer, config, scale)

        def reference() -> tuple[Architecture, Any]:
            if isinstance(stage, Distill):
                teacher, weights_of = self._teacher(stage, layout)
                if teacher.renderer.tokenizer.digest != model.renderer.tokenizer.digest:
                    raise OtherTokenizerError("teacher", stage.teacher.name)
                return teacher.architecture, weights_of
            stated = getattr(stage, "reference", None)
            if stated is not None:
                origin = session.origins.of(self.node, stated)
                return plain(model.architecture), loaded(origin, model, layout, weights)
            return beginning()

        def beginning() -> tuple[Architecture, Any]:
            # What an adapter leaves frozen and its beginning are the model that it starts from.
            own, frozen = split_trainable(architecture, params)
            return architecture, merge_params(jax.tree.map(jnp.copy, own), frozen)

        def critic() -> tuple[Architecture, Any]:
            assert isinstance(stage, Ppo)
            if stage.critic.trunk == "shared":
                own: tuple[Architecture, Any] = architecture, nnx.State({})
            elif stage.value_model is None:
                own = beginning()
            else:
                origin = session.origins.of(self.node, stage.value_model)
                other = resources.model(origin.model)
                if other.renderer.tokenizer.digest != model.renderer.tokenizer.digest:
                    raise OtherTokenizerError("value_model", stage.value_model.name)
                continued = isinstance(stage.adapter, Continued)
                adapter = source.adapters[-1][0] if continued else stage.adapter
                own = starting(origin, adapter, other, layout, weights)
            if own[0].scores:
                return own
            # Zeros: what is not learned yet is no opinion.
            return scoring(*own, score_head(own[0], jnp.zeros(own[0].width), layout))

        if isinstance(stage, Supervised):
            trainer: Any = supervised_trainer(
                resources, stage, model, planned, layout, seed, begin, reference, self.marks(),
                self.folder.path,
            )  # fmt: skip
            close: Callable[[], None] = lambda: None  # noqa: E731
        elif isinstance(stage, Policy):
            reward = Reward(stage.reward, resources.surroundings(stage.rollout.max_tokens))
            close = reward.close
            try:
                trainer = policy_trainer(
                    resources, stage, model, planned, layout, seed, begin,
                    reference, critic, reward, self.marks(),
                )  # fmt: skip
            except BaseException:
                close()
                raise
        else:
            raise NotBuiltError(self.planned.stage, f"the kind `{self.planned.kind}`")
        return trainer, model, close

    def _teacher(self, stage: Distill, layout: Layout) -> tuple[Model, Any]:
        session = self.session
        origin = session.origins.of(self.node, stage.teacher)
        model = session.resources.model(origin.model)
        model = replace(model, architecture=plain(model.architecture))
        weights = derive(session.seed(stage.seed), "weights") % 2**31
        return model, loaded(origin, model, layout, weights)

    def _compared(
        self,
        stage: Distill,
        recorder: Recorder,
        model: Model,
        state: TrainState,
        layout: Layout,
        step: int,
    ) -> dict[str, float]:
        """Measure the teacher as the student was, and say how the two compare."""
        session = self.session
        session.reporter.doing("comparing with the teacher")
        teacher, params = self._teacher(stage, layout)
        _, known = session.measured(self.planned, stage.evals, teacher, params, layout, {})
        student = model, state.decoder_params
        found = compared(student, (teacher, params), layout, recorder.last, known)
        found |= {f"teacher/{name}": value for name, value in known.items()}
        recorder.evaluated(step, found)
        return found

    def evaluate(
        self, recorder: Recorder, model: Model, params: Any, layout: Layout, step: int
    ) -> dict[str, float]:
        """Run the stage's evals; what is known of the weights that it starts from is not run
        again.
        """
        session = self.session
        found: dict[str, float] = {}
        for reference in self.stage.evals:
            digest = self.planned.fingerprint.components[f"eval {reference.name}"]
            if step == 0 and digest in self.evals:
                found |= named(reference, Evaluation(self.evals[digest]))
                continue
            session.reporter.doing(f"evaluating {reference.name}")
            evaluation = evaluate(session.resources, reference.name, model, params, layout)
            self.evals[digest] = dict(evaluation.metrics)
            found |= named(reference, evaluation)
            for shown in evaluation.shown:
                recorder.sample(step, {"eval": reference.name, **shown.row()})
        session.tell_bad_rows()
        return found

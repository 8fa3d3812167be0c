"""Rules that compare values: what no attribute can know by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tunelang.dsl import messages
from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Diagnostics
from tunelang.dsl.program import Declared, Program
from tunelang.dsl.resolve.binding import Place
from tunelang.dsl.resolve.scope import Module
from tunelang.dsl.rules import external
from tunelang.dsl.rules.data_fields import declared_names, examples
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import data, models, rewards, stages, training
from tunelang.dsl.vocabulary.base import (
    DataExpression,
    Kind,
    Node,
    Reference,
    TextExpression,
)


def references_in(
    value: Any, path: str
) -> Iterator[tuple[str, Reference | data.DataRef | rewards.RewardRef]]:
    """Every reference inside a value, with the path of the attribute that it stands in."""
    if isinstance(value, Reference | data.DataRef | rewards.RewardRef):
        yield path, value
    elif isinstance(value, Node):
        for name, field_info in type(value).model_fields.items():
            inner = f"{path}.{field_info.alias or name}"
            yield from references_in(getattr(value, name), inner)
    elif isinstance(value, tuple):
        for item in value:
            yield from references_in(item, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from references_in(item, f"{path}.{key}")


def uses(declared: Declared) -> set[str]:
    """The names that a declaration refers to."""
    values = [branch.value for branch in declared.branches] or [declared.value]
    return {found.name for value in values for _, found in references_in(value, "")}


def unused(root: Module, diagnostics: Diagnostics) -> None:
    """Warn of declarations of the spec itself that nothing uses."""
    for symbol in root.names.values():
        if symbol.module is root and not symbol.used and symbol.noun != "stage":
            if symbol.value is not None:
                diagnostics.add(messages.unused(symbol))


def apply(
    program: Program, places: dict[int, Place], diagnostics: Diagnostics, elsewhere: bool
) -> None:
    """Check a Program that may lack declarations which were reported already. `elsewhere` says that
    it is for other hardware than its own.
    """
    book = Book(program, places, diagnostics, elsewhere)
    external.check(book)
    for declared in program.declarations.values():
        values = [branch.value for branch in declared.branches] or [declared.value]
        for value in values:
            match value:
                case models.Transformer():
                    _transformer(book, declared, value)
                case models.Tpu():
                    _topology(book, declared, value)
                case rewards.Generate():
                    _generate(book, declared, value)
                case stages.Training():
                    _training(book, declared, value)
                    if isinstance(value, stages.Policy):
                        _policy(book, declared, value)
                case stages.Evaluate():
                    for reference in value.models:
                        _measured(book, declared, reference, value.evals)
            for contradiction in _contradictions(value):
                path, *words = contradiction
                book.add(messages.contradiction(book.span(declared, path), *words))
        _yields(book, declared, values)
        if declared.noun == "stage":
            _sweep(book, declared)
    _outputs(book)
    _winners(book)


@dataclass
class Book:
    """A Program with the places of its values, and where to report."""

    program: Program
    places: dict[int, Place]
    diagnostics: Diagnostics
    elsewhere: bool
    fields: dict[str, frozenset[str] | None] = field(default_factory=dict)
    contexts: dict[str, int | None] = field(default_factory=dict)
    """Model -> its context as its own files say."""
    models: dict[str, Kind | None] = field(default_factory=dict)
    """Model or stage -> the model at its start, as far as it was looked up."""
    owners: dict[int, Declared] = field(default_factory=dict)
    """Identity of a model's value -> its declaration."""

    def add(self, diagnostic: Diagnostic) -> None:
        """Report."""
        self.diagnostics.add(diagnostic)

    def span(self, declared: Declared, path: str = "") -> Span:
        """The place of a value, or of what it stands in, or of the declared name."""
        parts = [declared.noun, declared.name, *path.split(".")] if path else []
        while len(parts) > 2:
            origin = self.program.origins.get(".".join(parts))
            if origin is not None:
                return origin.span
            parts.pop()
        assert declared.span is not None
        return declared.span

    def argument(self, value: Any, name: str, otherwise: Span) -> Span:
        """The place of an argument of a call, or of the call."""
        place = self.places.get(id(value))
        return place.arguments.get(name, place.span) if place else otherwise

    def declared(self, name: str) -> Declared | None:
        """A declaration, unless it was invalid."""
        return self.program.declarations.get(name)

    def owner(self, model: Kind) -> Declared | None:
        """The declaration of a model."""
        if not self.owners:
            self.owners = {id(found.value): found for found in self.program.of("model")}
        return self.owners.get(id(model))

    def model_of(self, reference: Reference) -> Kind | None:
        """The model at the start of a chain of stages."""
        chain: list[str] = []
        model: Kind | None = None
        while reference.name not in self.models:
            chain.append(reference.name)
            found = self.declared(reference.name)
            if found is None or found.noun == "model":
                model = found.value if found else None
                break
            start = getattr(found.branches[0].value, "from_", None) if found.branches else None
            if not isinstance(start, Reference):
                break
            reference = start
        else:
            model = self.models[reference.name]
        self.models.update(dict.fromkeys(chain, model))
        return model


# Models and hardware.


def _transformer(book: Book, declared: Declared, model: models.Transformer) -> None:
    sizes = {name: getattr(model, name) for name in ("layers", "width", "heads")}
    missing = [name for name, size in sizes.items() if size is None]
    if model.preset is None and missing:
        book.add(messages.missing_sizes(book.span(declared), missing, len(missing) == len(sizes)))
        return
    if model.heads and model.width and model.head_dim is None and model.width % model.heads:
        book.add(messages.heads(book.span(declared, "heads"), model.heads, model.width, key=False))
    if model.heads and model.kv_heads and model.heads % model.kv_heads:
        span = book.span(declared, "kv_heads")
        book.add(messages.heads(span, model.kv_heads, model.heads, key=True))
    if model.experts is not None and model.experts.active > model.experts.count:
        span = book.span(declared, "experts.active")
        book.add(messages.too_many_active(span, model.experts.active, model.experts.count))


def _topology(book: Book, declared: Declared, tpu: models.Tpu) -> None:
    generation, _, shape = tpu.topology.partition(":")
    if shape not in models.TOPOLOGIES.get(generation, ()):
        span = book.span(declared, "topology")
        book.add(messages.unknown_topology(span, tpu.topology, models.TOPOLOGIES))


def _devices(book: Book, stage: stages.Training) -> tuple[int, Declared] | None:
    """How many devices the stage's hardware has, where the spec says so."""
    reference = stage.on or book.program.run.on
    declared = book.declared(reference.name) if reference is not None else None
    if declared is None:
        return None
    match declared.value:
        case models.Tpu(topology=topology, slices=slices):
            shape = topology.partition(":")[2].split("x")
            if not all(part.isdigit() for part in shape):
                return None
            count = slices
            for part in shape:
                count *= int(part)
            return count * (2 if topology.startswith("tpu7x") else 1), declared
        case models.Gpu(nodes=nodes, devices=devices):
            return nodes * devices, declared
        case models.Local(devices=int(devices)):
            return devices, declared
    return None


# Stages.


def _training(book: Book, declared: Declared, stage: stages.Training) -> None:
    _start(book, declared, stage)
    _warmup(book, declared, stage)
    _spacing(book, declared, stage)
    _division(book, declared, stage)
    _roles(book, declared, stage)
    _evals(book, declared, stage)
    _measured(book, declared, Reference.unvalidated(noun="stage", name=declared.name), stage.evals)


def _start(book: Book, declared: Declared, stage: stages.Training) -> None:
    start = book.declared(stage.from_.name)
    if start is None or (start.branches and start.branches[0].value.yields != "model"):
        return
    model, span = start.value, book.span(declared, "from")
    if isinstance(model, models.Pretrained) and model.weights and stage.adapter is None:
        book.add(messages.quantized_without_adapter(span, declared, model.weights))
    if isinstance(model, models.Transformer) and isinstance(stage.adapter, training.Lora):
        book.add(messages.adapter_of_random(span, start))
    if isinstance(stage.adapter, training.Continued):
        starts = [branch.value for branch in start.branches] or [start.value]
        if any(getattr(value, "adapter", None) is None for value in starts):
            book.add(messages.nothing_to_continue(book.span(declared, "adapter"), start))


def _yields(book: Book, declared: Declared, values: list[Any]) -> None:
    """A stage that is named somewhere has to yield what is used there."""
    seen: set[tuple[str, str]] = set()
    for value in values:
        for path, reference in references_in(value, ""):
            stage = book.declared(reference.name)
            if stage is None or stage.noun != "stage" or not stage.branches:
                continue
            path = path.removeprefix(".")
            wanted = getattr(value, "reads", {}).get(path, ("model",))
            if stage.branches[0].value.yields not in wanted and (path, stage.name) not in seen:
                seen.add((path, stage.name))
                book.add(messages.yields_other(book.span(declared, path), stage, wanted))


def _contradictions(value: Any) -> Iterator[tuple[str, str, str, str]]:
    """Attributes that cannot both be: where, the title, the label, the help."""
    if isinstance(value, stages.Policy) and value.loss is not None and value.clip is not None:
        yield (
            "loss",
            "a loss of your own takes the place of the clipped one",
            f"`{value.clip.word}` would have no effect",
            "`clip = none`",
        )
    match value:
        case stages.Distill():
            if value.teacher_log_probs == "ahead":
                where = "teacher_log_probs"
                if value.top_k is None:
                    yield (
                        where,
                        "all log-probabilities of a teacher are too many to store",
                        ("needs `top_k`"),
                        "store those of its likeliest tokens: `top_k = 64`",
                    )
                if value.on_policy:
                    yield (
                        where,
                        "the teacher cannot know answers that are sampled later",
                        ("with `on_policy`"),
                        "let it run beside the student: `teacher_log_probs = live`",
                    )
                if value.attention is not None or value.features is not None:
                    yield (
                        where,
                        "only log-probabilities are stored ahead",
                        ("with `attention` or `features`"),
                        "let the teacher run beside the student: `teacher_log_probs = live`",
                    )
            pooled = value.features is not None and value.features.pooling != "token"
            if value.packing and (value.on_policy or pooled):
                yield (
                    ("on_policy" if value.on_policy else "features"),
                    ("one example has to be a whole sequence here"),
                    "examples share sequences",
                    "`packing = false`",
                )
        case stages.Preference():
            if value.label_smoothing and value.loss not in ("sigmoid", "robust"):
                yield (
                    "label_smoothing",
                    f"the loss `{getattr(value.loss, 'name', value.loss)}` does not read it",
                    ("has no effect"),
                    "`loss = sigmoid` or `loss = robust`",
                )
            if value.label_smoothing >= 0.5:
                yield (
                    "label_smoothing",
                    "more than half of the labels would be wrong",
                    ("below 50%"),
                    "exchange `chosen` and `rejected`",
                )
        case stages.Ppo():
            if value.kl_target is not None and (value.kl is None or value.kl.at != "reward"):
                yield (
                    "kl_target",
                    "there is no divergence in the reward whose coefficient could adapt",
                    "has no effect",
                    "take it off the reward: `kl = k1(0.05, at = reward)`",
                )
            if value.value_model is not None and value.critic.trunk == "shared":
                yield (
                    "value_model",
                    "a critic with a shared trunk starts from the policy",
                    "has no effect",
                    "`critic = critic(trunk = separate)`, or take it out",
                )
        case stages.Merge():
            count, method = 1 + len(value.others), value.method
            weights = getattr(method, "weights", None)
            if weights is not None and len(weights) != count:
                yield (
                    "method",
                    f"{len(weights)} weights for {count} models",
                    ("a weight for each"),
                    "the first is of `from`, the others in the order of `others`",
                )
            if isinstance(method, training.Slerp) and count != 2:
                yield (
                    "method",
                    f"an arc leads from one model to another, and these are {count}",
                    ("of two models"),
                    "`linear()`, or one merge after another",
                )
        case rewards.Generate():
            if value.beams is not None and (value.temperature or value.top_k or value.top_p):
                yield (
                    "beams",
                    "a beam search does not sample",
                    ("with `temperature`, `top_k` or `top_p`"),
                    "leave out either",
                )
            if value.beams is not None and value.samples > value.beams:
                yield (
                    "samples",
                    f"{value.beams} beams find no {value.samples} completions",
                    ("more than there are beams"),
                    f"`beams = {value.samples}`",
                )
            if value.rank is not None and value.samples < 2:
                yield (
                    "rank",
                    "there is nothing to choose from",
                    ("one completion for each prompt"),
                    "`samples = 4, temperature = 1.0`",
                )


def _measured(
    book: Book, declared: Declared, model: Reference, evals: tuple[Reference, ...]
) -> None:
    """A reward model answers nothing: only its preferences can be measured."""
    found = book.declared(model.name)
    if found is None or not found.branches or found.branches[0].value.yields != "scores":
        return
    for reference in evals:
        measured = book.declared(reference.name)
        if measured is not None and not isinstance(measured.value, rewards.Preference):
            title = f"`{model.name}` scores answers, and `{reference.name}` asks for some"
            help = "measure it with a `preference` eval"
            span = book.span(declared, "evals")
            book.add(messages.contradiction(span, title, "not of a reward model", help))


def _warmup(book: Book, declared: Declared, stage: stages.Training) -> None:
    warmup, length = stage.optimizer.warmup, stage.length
    if warmup.unit == length.unit and warmup.value > length.value:
        span = book.span(declared, "optimizer.warmup")
        book.add(messages.warmup_too_long(span, warmup, length, book.span(declared, "length")))


def _spacing(book: Book, declared: Declared, stage: stages.Training) -> None:
    """Evaluations further apart than the stage is long never happen."""
    if stage.length.unit == "steps" and (stage.eval_every or 0) > stage.length.value:
        book.add(messages.never_evaluated(book.span(declared, "eval_every"), stage.length))


def _division(book: Book, declared: Declared, stage: stages.Training) -> None:
    """The batch against the micro-batch and mesh that the stage pins."""
    sequences: int | None = None
    formula = ""
    if isinstance(stage, stages.Policy):
        sequences = stage.batch * stage.group
        formula = f"{stage.batch} prompts × group {stage.group}"
        if sequences % stage.minibatches:
            span = book.span(declared, "minibatches")
            book.add(messages.minibatches(span, stage.batch, stage.group, stage.minibatches))
    elif isinstance(stage, stages.Supervised) and stage.batch.unit == "sequences":
        sequences = int(stage.batch.value)
        formula = f"{sequences}"
    mesh = stage.mesh
    copies = mesh.data * mesh.fsdp if mesh is not None else 1
    if sequences is not None and (mesh is not None or stage.micro_batch is not None):
        parts = []
        if mesh is not None:
            parts += [(n, s) for n, s in (("data", mesh.data), ("fsdp", mesh.fsdp)) if s > 1]
        if stage.micro_batch is not None:
            parts.append(("micro-batch", stage.micro_batch))
        step = copies * (stage.micro_batch or 1)
        if sequences % step:
            pinned = book.span(declared, "micro_batch" if stage.micro_batch else "mesh")
            span = book.span(declared, "batch")
            group = stage.group if isinstance(stage, stages.Policy) else 1
            book.add(
                messages.batch_does_not_divide(span, sequences, formula, parts, step, group, pinned)
            )
    devices = None if book.elsewhere else _devices(book, stage)
    if mesh is not None and devices is not None:
        size = copies * mesh.tensor * mesh.expert * mesh.context
        if size != devices[0]:
            book.add(messages.mesh_size(book.span(declared, "mesh"), size, *devices))


def _roles(book: Book, declared: Declared, stage: stages.Training) -> None:
    """The data of a stage must have the roles that its kind trains on."""
    for found in examples(stage.data, book.program, book.fields):
        source = book.declared(found.source)
        assert source is not None
        if not source.damaged and not any(found.roles.issuperset(need) for need in stage.needs):
            span = book.span(declared, "data")
            book.add(messages.missing_role(span, declared, source, found.roles, stage.needs))


def _evals(book: Book, declared: Declared, stage: stages.Training) -> None:
    for reference in stage.evals:
        found = book.declared(reference.name)
        if found is None:
            continue
        if isinstance(found.value, rewards.Generate):
            _fits(book, stage, found.value.max_tokens, 0, book.span(found, "max_tokens"))
        measured = found.value.data
        shared = _rows(book, stage.data) & _rows(book, measured)
        if shared:
            path = min(shared)[0]
            book.add(messages.trains_on_eval(book.span(declared, "data"), found, path))


def _rows(book: Book, expression: DataExpression, selection: str = "") -> set[tuple[str, str]]:
    """The files that an expression reads, with how rows are chosen from them: equal pairs hold
    equal rows. Only choices that are known to overlap are looked for: all rows, or the same ones.
    """
    match expression:
        case data.DataRef():
            declared = book.declared(expression.name)
            value = declared.value if declared is not None else None
            if isinstance(value, DataExpression):
                return _rows(book, value, selection)
            return {(path, selection) for path in getattr(value, "path", ())}
        case data.Mixture():
            return set().union(*(_rows(book, part, selection) for part in expression.parts))
        case data.Weighted():
            return _rows(book, expression.of, selection)
        case data.Take() | data.Skip() | data.Where() | data.Split():
            own = expression.model_copy(update={"of": None})
            return _rows(book, expression.of, f"{selection}{own!r}")
        case data.DataMethod():
            return _rows(book, expression.of, selection)
    return set()


def _policy(book: Book, declared: Declared, stage: stages.Policy) -> None:
    if stage.group < 2 and (stage.advantage != "gae" or stage.refill):
        book.add(messages.group_too_small(book.span(declared, "group"), declared))
    if stage.rollout.temperature == 0:
        book.add(messages.greedy(book.span(declared, "rollout.temperature"), declared))
    if stage.reference is not None and stage.kl is None:
        book.add(messages.reference_without_kl(book.span(declared, "reference")))
    _context(book, declared, stage)
    for value in _nodes(stage.reward, book.program):
        if isinstance(value, rewards.Overlong) and value.buffer > stage.rollout.max_tokens:
            span = book.argument(value, "buffer", book.span(declared, "reward"))
            limit = book.span(declared, "rollout.max_tokens")
            book.add(messages.overlong_buffer(span, value.buffer, stage.rollout.max_tokens, limit))
    if not any(_looks(value) for value in _nodes(stage.reward, book.program)):
        book.add(messages.constant_reward(book.span(declared, "reward")))


def _looks(value: Node) -> bool:
    """Whether a part of a reward depends on the completion."""
    if isinstance(value, rewards.RewardConstant | rewards.RewardOperator | rewards.BySource):
        return False
    fields = [getattr(value, name) for name in type(value).model_fields]
    templates = [part for part in fields if isinstance(part, TextExpression)]
    return not templates or any(_reads_completion(template) for template in templates)


def _reads_completion(template: TextExpression) -> bool:
    if isinstance(template, data.TemplateText):
        return "{completion}" in template.text
    inner = [getattr(template, name) for name in type(template).model_fields]
    return any(_reads_completion(part) for part in inner if isinstance(part, TextExpression))


def _context(book: Book, declared: Declared, stage: stages.Policy) -> None:
    """Prompt and completion of a rollout must fit into the model's context."""
    rollout, path = stage.rollout, "rollout.max_tokens"
    _fits(book, stage, rollout.max_tokens, rollout.max_prompt or 0, book.span(declared, path))


def _fits(book: Book, stage: stages.Training, completion: int, prompt: int, span: Span) -> None:
    model = book.model_of(stage.from_)
    if model is None:
        return
    owner = book.owner(model)
    name = owner.name if owner is not None else ""
    context = getattr(model, "context", None) or book.contexts.get(name)
    if context is not None and completion + max(prompt, 1) > context:
        where = book.span(owner, "context") if owner else None
        book.add(messages.beyond_context(span, completion, prompt, context, name, where))


def _nodes(value: Any, program: Program) -> Iterator[Node]:
    """Every part of a reward, through the names of declared rewards."""
    if isinstance(value, rewards.RewardRef):
        declared = program.declarations.get(value.name)
        if declared is None:
            yield rewards.Length.unvalidated()  # unknown: reported already, anything may stand here
        elif isinstance(declared.value, rewards.RewardKind):
            yield declared.value
        else:
            yield from _nodes(declared.value, program)
        return
    if isinstance(value, Node):
        yield value
    if isinstance(value, rewards.RewardOperator):
        for operand in value.operands:
            yield from _nodes(operand, program)
    elif isinstance(value, rewards.BySource):
        for part in value.sources.values():
            yield from _nodes(part, program)


def _generate(book: Book, declared: Declared, value: rewards.Generate) -> None:
    if value.samples > 1 and value.temperature == 0 and value.beams is None:
        span = book.span(declared, "samples")
        book.add(messages.greedy_samples(span, value.samples))


# Sweeps.


def _sweep(book: Book, declared: Declared) -> None:
    """The winner of a sweep must be measured."""
    for branch in declared.branches:
        stage = branch.value
        keep = getattr(stage, "keep", None)
        if not isinstance(keep, training.Winner) or declared.damaged:
            return
        span = book.span(declared, "keep")
        if not declared.fans_out and not _inherits(book, declared):
            book.add(messages.keep_without_each(span))
        if isinstance(keep, training.Best | training.Lowest) and isinstance(stage, stages.Training):
            _metric(book, declared, stage, keep)


def _metric(
    book: Book, declared: Declared, stage: stages.Training, keep: training.Best | training.Lowest
) -> None:
    span = book.argument(keep, "metric", book.span(declared, "keep"))
    known = dict(stage.metrics)
    for reference in stage.evals:
        found = book.declared(reference.name)
        if found is None:
            return
        for at, (metric, doc) in enumerate(found.value.measures.items()):
            known[f"{found.name}.{metric}"] = doc
            if at == 0:
                known[found.name] = doc
    if isinstance(stage, stages.Policy):
        for name in declared_names(stage.data, book.program):
            known[f"{name}.reward"] = "mean reward of this source"
    if keep.metric in known:
        return
    head = book.declared(keep.metric) or book.declared(keep.metric.rpartition(".")[0])
    if head is not None and head.noun == "eval" and head.name not in [r.name for r in stage.evals]:
        has_evals = f"{declared.noun}.{declared.name}.evals" in book.program.origins
        where = book.span(declared, "evals") if has_evals else None
        book.add(messages.metric_not_measured(span, head, declared, where))
    else:
        book.add(messages.unknown_metric(span, keep.metric, declared, list(known)))


def _inherits(book: Book, declared: Declared) -> bool:
    """Whether a stage fans out because one that it uses keeps all of its branches."""
    for branch in declared.branches:
        for _, reference in references_in(branch.value, ""):
            found = book.declared(reference.name)
            if found is None or found.noun != "stage" or found.name == declared.name:
                continue
            keeps_all = isinstance(getattr(found.branches[0].value, "keep", None), training.All)
            if keeps_all and (found.fans_out or _inherits(book, found)):
                return True
    return False


def _winners(book: Book) -> None:
    """A stage that fans out can be used where one model is needed only if it names its winner."""
    for declared in book.program.declarations.values():
        values = [branch.value for branch in declared.branches] or [declared.value]
        for value in values:
            for path, reference in references_in(value, ""):
                found = book.declared(reference.name)
                if found is None or found.noun != "stage" or not found.branches:
                    continue
                keep = getattr(found.branches[0].value, "keep", None)
                if keep is None and (found.fans_out or _inherits(book, found)):
                    span = book.span(declared, path.removeprefix("."))
                    book.add(messages.no_winner(span, found, book.span(found)))


def _outputs(book: Book) -> None:
    """Two stages must not write into one folder."""
    seen: dict[str, Declared] = {}
    for declared in book.program.of("stage"):
        for branch in declared.branches:
            if isinstance(branch.value, stages.Export):
                if _inherits(book, declared) and not declared.fans_out:
                    book.add(messages.every_branch(book.span(declared, "from"), branch.value.path))
                path = branch.value.path.rstrip("/")
                if path in seen:
                    other = book.span(seen[path], "path")
                    book.add(messages.same_output(book.span(declared, "path"), path, other))
                seen[path] = declared

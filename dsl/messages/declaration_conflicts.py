"""Messages about stages, models, data and rewards that do not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Edit, Label
from tunelang.dsl.messages.wording import article, choose, error, listed, nearest, replace_fix
from tunelang.dsl.program import Declared
from tunelang.dsl.syntax import units
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary.base import Measure

# Models and hardware.


def missing_sizes(span: Span, missing: Sequence[str], all_of_them: bool) -> Diagnostic:
    """Say that a transformer lacks sizes."""
    help = 'or take those of a well-known model: `preset = "qwen3-0.6b"`' if all_of_them else None
    return error(
        "missing-attribute",
        f"this transformer needs {listed(missing)}",
        span,
        "missing here",
        help=help,
    )


def heads(span: Span, count: int, size: int, key: bool) -> Diagnostic:
    """Say that heads do not divide the width, or key heads the query heads."""
    near = [n for n in range(max(1, count // 2), count * 2) if size % n == 0]
    near.sort(key=lambda n: (abs(n - count), n))
    nearest_two = ", ".join(str(n) for n in sorted(near[:2]))
    what = f"{count} key heads do not divide {size} query heads"
    return error(
        "does-not-divide",
        what if key else f"{count} heads do not divide the width, {size}",
        span,
        f"{size} / {count} = {size / count:.4g}",
        help=f"the nearest that divide: {nearest_two}" if near else None,
    )


def too_many_active(span: Span, active: int, count: int) -> Diagnostic:
    """Say that more experts are active than exist."""
    return error("out-of-range", "more active experts than experts", span, f"{active} of {count}")


def unknown_topology(span: Span, text: str, known: Mapping[str, Sequence[str]]) -> Diagnostic:
    """Say that a TPU slice does not exist."""
    generation, _, shape = text.partition(":")
    if generation not in known:
        near = {"v7x": "tpu7x", "v7": "tpu7x", "v5": "v5p", "v5litepod": "v5e"}.get(
            generation
        ) or nearest(generation, list(known))
        help = f"did you mean `{near}`?" if near else f"there is {listed(list(known))}"
        return error("unknown-topology", f"there is no TPU `{generation}`", span, help=help)
    shapes = ", ".join(known[generation])
    return error(
        "unknown-topology",
        f"{generation} has no slice of the shape `{shape}`",
        span,
        help=f"there is {shapes}",
    )


def mesh_size(span: Span, size: int, devices: int, hardware: Declared) -> Diagnostic:
    """Say that a pinned mesh has another number of devices than the hardware."""
    return error(
        "mesh-does-not-fit",
        f"this mesh has {size} devices, and `{hardware.name}` has {devices}",
        span,
        seconds=[Label(hardware.span, f"{devices} devices")] if hardware.span else [],
    )


# Batches, lengths.


def batch_does_not_divide(
    span: Span,
    sequences: int,
    formula: str,
    parts: Sequence[tuple[str, int]],
    step: int,
    group: int,
    pinned: Span,
) -> Diagnostic:
    """Say that a batch does not divide over the pinned mesh and micro-batch."""
    product = " × ".join(f"{name} {size}" for name, size in parts)
    left = f"{formula} = {sequences}" if formula != str(sequences) else formula
    unit = step // _gcd(step, group)
    now = sequences // group
    near = sorted({max(unit, now // unit * unit), (now // unit + 1) * unit})
    what = "sequences" if group == 1 else "prompts"
    return error(
        "does-not-divide",
        f"{sequences} sequences do not divide over the mesh and micro-batch",
        span,
        f"{left} = {product} × {sequences / step:.5g}",
        seconds=[Label(pinned, "pinned here")],
        help=f"the nearest that divide: {', '.join(f'{n} {what}' for n in near)}",
    )


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def minibatches(span: Span, prompts: int, group: int, count: int) -> Diagnostic:
    """Say that minibatches do not divide the completions of a step."""
    total = prompts * group
    return error(
        "does-not-divide",
        f"{count} minibatches do not divide {total} completions",
        span,
        f"{prompts} prompts × group {group} = {total} = {count} × {total / count:.5g}",
    )


def warmup_too_long(span: Span, warmup: Measure, length: Measure, where: Span) -> Diagnostic:
    """Say that a warm-up is longer than the stage."""
    return error(
        "warmup-too-long",
        "the warm-up is longer than the stage",
        span,
        _measure(warmup),
        seconds=[Label(where, f"the stage is {_measure(length)} long")],
        help="a share of the stage, such as `warmup = 3%`, always fits",
    )


def _measure(measure: Measure) -> str:
    return units.show(measure.value, measure.unit)


def beyond_context(
    span: Span, completion: int, prompt: int, context: int, model: str, where: Span | None
) -> Diagnostic:
    """Say that prompt and completion are longer than the model's context."""
    if prompt:
        label = f"prompt {prompt:,} + completion {completion:,} = {prompt + completion:,} tokens"
    else:
        label = f"{completion:,} tokens, and the prompt"
    limit = f"the context of `{model}` is {context:,} tokens"
    return error(
        "beyond-context",
        "prompt and completion do not fit into the context",
        span,
        label,
        seconds=[Label(where, limit)] if where else [],
        notes=[] if where else [limit],
    )


def never_evaluated(span: Span, length: Measure) -> Diagnostic:
    """Say that the stage ends before `eval_every`."""
    return error(
        "no-effect",
        f"the stage ends after {_measure(length)}, before this",
        span,
        severity="warning",
        help="evaluations at the start and the end are not affected",
    )


# Policy optimisation.


def group_too_small(span: Span, stage: Declared) -> Diagnostic:
    """Say that a group has one completion, and so nothing to compare."""
    return error(
        "group-too-small",
        f"{stage.kind} compares the completions of a group: one is not enough",
        span,
        "at least 2",
        help="with one completion every advantage is 0 and nothing is learned",
    )


def greedy(span: Span, stage: Declared) -> Diagnostic:
    """Say that a rollout at temperature 0 gives equal completions."""
    return error(
        "greedy-rollout",
        "at temperature 0 all completions of a group are the same",
        span,
        "nothing to compare",
        help=f"{stage.kind} learns from differences: `temperature = 1.0`",
    )


def greedy_samples(span: Span, samples: int) -> Diagnostic:
    """Say that several samples at temperature 0 are equal."""
    return error(
        "greedy-rollout",
        "at temperature 0 all samples of a prompt are the same",
        span,
        f"{samples} equal samples",
        help="set a `temperature`, such as 0.7",
    )


def reference_without_kl(span: Span) -> Diagnostic:
    """Say that a reference is set but no divergence from it is measured."""
    return error(
        "no-effect",
        "a `reference` without `kl` has no effect",
        span,
        help="add `kl = k3(0.04)`, or remove it",
        severity="warning",
    )


def overlong_buffer(span: Span, buffer: int, limit: int, where: Span) -> Diagnostic:
    """Say that a penalty for length would start below zero tokens."""
    return error(
        "out-of-range",
        "the penalty would start before the first token",
        span,
        f"{buffer:,} tokens",
        seconds=[Label(where, f"a completion has at most {limit:,}")],
    )


def constant_reward(span: Span) -> Diagnostic:
    """Say that a reward does not depend on the completion."""
    return error(
        "constant-reward",
        "no part of this reward depends on the completion",
        span,
        "the same for the whole group",
        severity="warning",
        help='use it in a template: `exact("{completion}", "{target}")`',
    )


# Stages among one another.


def missing_role(
    span: Span,
    stage: Declared,
    source: Declared,
    roles: frozenset[str],
    needs: Sequence[Sequence[str]],
) -> Diagnostic:
    """Say that the data lacks roles that the stage trains on."""
    need = max(needs, key=lambda need: len(roles.intersection(need)))
    others = ", or ".join(listed(other) for other in needs if other != need)
    missing = [role for role in need if role not in roles]
    example = {
        "text": 'text = "{text}"',
        "prompt": 'prompt = "{question}"',
        "response": 'response = "{answer}"',
        "chosen": 'chosen = "{good}"',
        "rejected": 'rejected = "{bad}"',
        "label": 'label = "{is_good}"',
    }
    has = f"`{source.name}` has {listed(sorted(roles)) or 'no role'}"
    return error(
        "missing-role",
        f"{article(stage.kind or '')} stage needs data with {listed(need)}",
        span,
        has,
        seconds=[
            Label(source.span, f"add {listed([example[r] for r in missing if r in example])} here")
        ]
        if source.span
        else [],
        help=f"or with {others}" if others else None,
    )


def trains_on_eval(span: Span, measured: Declared, path: str) -> Diagnostic:
    """Say that an eval measures rows that the stage trains on."""
    return error(
        "trains-on-eval",
        f"`{measured.name}` is measured on rows that this stage trains on",
        span,
        f"both read `{path}`",
        severity="warning",
        seconds=[Label(measured.span, "the eval")] if measured.span else [],
        help="hold out a part: `math.split(test = 5%)`, then `.train` and `.test`",
    )


def adapter_of_random(span: Span, model: Declared) -> Diagnostic:
    """Say that an adapter would be on random weights."""
    return error(
        "adapter-of-random",
        f"the weights of `{model.name}` are random, and an adapter would leave them random",
        span,
        help="train all weights first, in a stage without `adapter`",
    )


def nothing_to_continue(span: Span, start: Declared) -> Diagnostic:
    """Say that `continued` starts from a stage without an adapter."""
    return error(
        "nothing-to-continue",
        f"`{start.name}` has no adapter to continue",
        span,
        help="start one: `adapter = lora(rank = 16)`",
    )


def quantized_without_adapter(span: Span, stage: Declared, weights: str) -> Diagnostic:
    """Say that quantised weights are frozen, and that there is no adapter to train."""
    return error(
        "quantized-needs-adapter",
        f"weights in {weights} are frozen: `{stage.name}` has nothing to train",
        span,
        help="train an adapter: `adapter = lora(rank = 16)`",
    )


def eval_of_reward_model(span: Span, model: str, eval_name: str) -> Diagnostic:
    """Say that an eval samples answers, which a reward model cannot give."""
    return error(
        "contradiction",
        f"`{eval_name}` samples answers, and `{model}` only scores them",
        span,
        "not for a reward model",
        help="measure it with a `preference` eval",
    )


def yields_other(span: Span, stage: Declared, wanted: Sequence[str]) -> Diagnostic:
    """Say that a stage yields something else than its reader needs."""
    does = {
        "model": "yields a model",
        "scores": "yields a reward model",
        "rows": "yields rows of data",
        "files": "only writes files",
        "figures": "only measures",
    }[stage.branches[0].value.yields]
    what, help = {
        "model": ("a model", "start from a stage that trains or merges a model"),
        "scores": ("a reward model", "train one: `stage judge : reward_model { ... }`"),
        "rows": ("rows of data", "use a `sample` stage"),
    }[wanted[0]]
    return error(
        "yields-something-else",
        f"`{stage.name}` is not {what}: {article(stage.kind or '')} stage {does}",
        span,
        seconds=[Label(stage.span, "declared here")] if stage.span else [],
        help=help,
    )


def every_branch(span: Span, path: str) -> Diagnostic:
    """Say that an export would write every branch of a sweep to one path."""
    return error(
        "same-output",
        f"every branch would be written to `{path}`",
        span,
        "several branches",
        help="let the sweep name its winner: `keep = best(METRIC)`",
    )


def same_output(span: Span, path: str, other: Span) -> Diagnostic:
    """Say that two stages write to one path."""
    return error(
        "same-output", f"two stages write to `{path}`", span, seconds=[Label(other, "and here")]
    )


# Sweeps.


def no_winner(span: Span, stage: Declared, where: Span) -> Diagnostic:
    """Say that a reader needs one model, and the stage has several branches."""
    branches = f"{len(stage.branches)} branches" if stage.fans_out else "several branches"
    return error(
        "fan-out-without-winner",
        f"`{stage.name}` has {branches}: which one is used?",
        span,
        "this needs one model",
        seconds=[Label(where, f"fans out into {branches}")],
        help=f"choose one in `{stage.name}`: `keep = best(METRIC)`, `lowest(METRIC)`, or `all`",
    )


def keep_without_each(span: Span) -> Diagnostic:
    """Say that `keep` chooses among one branch."""
    return error(
        "no-effect",
        "`keep` chooses among branches, and this stage has one",
        span,
        severity="warning",
        help="fan out with `each(a, b)`, or remove `keep`",
    )


def metric_not_measured(
    span: Span, measured: Declared, stage: Declared, where: Span | None
) -> Diagnostic:
    """Say that the stage does not run the eval by which it chooses the winner."""
    fix: tuple[Edit, ...] = ()
    seconds: list[Label] = []
    if where is not None:
        seconds = [Label(where, "not in this list")]
        if where.text.startswith("[") and where.text.endswith("]"):
            inside = where.text[1:-1].strip()
            text = f"[{inside}, {measured.name}]" if inside else f"[{measured.name}]"
            fix = (Edit(where, text),)
    return error(
        "metric-not-measured",
        f"`{stage.name}` does not measure `{measured.name}`",
        span,
        seconds=seconds,
        help=f"add it to the stage: `evals = [{measured.name}]`" if not fix else None,
        fix=fix,
    )


def unknown_metric(span: Span, name: str, stage: Declared, known: list[str]) -> Diagnostic:
    """Say that the stage yields no metric of the name."""
    help = choose(name, known, "it yields") or f"it yields {listed(known)}"
    return error(
        "unknown-metric",
        f"`{stage.name}` yields no metric `{name}`",
        span,
        help=help,
        fix=replace_fix(span, name, known),
    )

"""The `export` stage: a model written to a folder."""

from __future__ import annotations

from typing_extensions import override

from tunelang.dsl.vocabulary.utility_stages import Export
from tunelang.runtime.loading.model_export import export_model
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.stage_kinds import Summary, TaskContext, TaskKind, register


@register
class ExportKind(TaskKind[Export]):
    """Writes a model as `transformers` loads it, or an adapter as PEFT does."""

    stages = (Export,)

    @override
    def run(self, stage: Export, context: TaskContext) -> Summary:
        context.doing("writing")
        origin = context.origin(stage.from_)
        model = context.resources.model(origin.model)
        layout = make_layout(fsdp=len(context.resources.devices))
        assert context.output is not None
        files = export_model(origin, stage, model, layout, context.output, context.digest)
        return {
            "model": origin.model, "from": origin.node, "path": str(context.output),
            "files": files,
        }  # fmt: skip

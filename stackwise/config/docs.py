"""Writes docs/configuration.md from the dataclasses: ``python -m stackwise.config.docs``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from stackwise.config.fields import FieldSpec, describe_type, field_specs, union_members
from stackwise.config.ranges import RANGES
from stackwise.config.renamed import REPLACED, new_names
from stackwise.config.schema import StackWiseConfig

INTRODUCTION = """\
# Configuration

A run is described by one YAML file. Every field has a default, so a file holds only what differs;
`configs/` has a commented one per recipe. This page is generated from the dataclasses in
`stackwise/config/schema.py` by `python -m stackwise.config.docs > docs/configuration.md`.

```bash
stackwise train configs/quickstart.yaml --set training.lr=3e-4 --set training.mode=end_to_end
stackwise plan configs/quickstart.yaml       # stages, parameters, memory and disk, without training
```

```python
from stackwise import StackWiseConfig

config = StackWiseConfig.from_yaml("configs/quickstart.yaml", ["training.lr=3e-4"])
config.training.batch_size = 16
config.validate()
config.to_yaml("mine.yaml")  # reads back equal
```

## How a file is read

- All faults are reported together: unknown keys (with the nearest valid one), types, ranges, and
  fields that contradict each other. Nothing is ignored silently; `stackwise train` prints what a
  combination decides or leaves without effect.
- Scalars follow YAML 1.2: `1e-4` is a number, only `true` and `false` are booleans, a date is text.
  Numbers in quotes are text and refused. Whole floats such as `1e5` are accepted where an integer
  is needed. Duplicate keys, tags, anchors and aliases are errors; so are infinities and NaN.
- `--set section.field=value` (and `from_yaml`'s second argument) reads the value as YAML:
  `--set "evaluation.mask_rates=[0.2, 0.8]"`, `--set training.max_steps=null`,
  `--set 'run.id="2024"'`. Sections below a section work too:
  `--set model.tokenizer_embedding.freeze_embeddings=true`.
- Relative paths are relative to the working directory, not to the file.
- The resolved configuration of a run, with every null shape field filled, is `config.yaml` in its
  folder.
"""

RENAMED = """\
## From the reference system's files

A key of the published reference system that is called differently here is answered with its new
name. Every other key of its files keeps its section and name.

| published key | here |
|---|---|
"""

REPLACED_HEADER = """\

Keys whose meaning became another setting:

| published key | here | |
|---|---|---|
"""

CHANGED = """\

Values that changed: `training.mixed_precision` is `none` or `bf16` instead of a boolean;
`model.attention_type` says `standard` where some files said `mha`; `data.padding: right` is
`data.packing: none`. `model.mla_q_rank` is null (queries not compressed) unless set.
"""


def render() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION, *_sections(StackWiseConfig, "", "")]
    parts += [RENAMED + _renamed_rows() + REPLACED_HEADER + _replaced_rows() + CHANGED]
    return "\n".join(parts)


def _sections(cls: type, path: str, help_text: str) -> Iterator[str]:
    specs = field_specs(cls)
    rows = [
        _row(f"{path}{name}", spec)
        for name, spec in specs.items()
        if spec.section is None or spec.default is None
    ]
    if path:
        yield f"## `{path.rstrip('.')}`\n\n{help_text}\n"
    elif rows:
        yield "## Top level\n"
    if rows:
        yield "| field | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    for name, spec in specs.items():
        if spec.section is not None:
            yield from _sections(spec.section, f"{path}{name}.", spec.help)


def _row(path: str, spec: FieldSpec) -> str:
    name = path.rsplit(".", 1)[-1]
    return f"| `{name}` | {_type(path, spec)} | {_default(spec.default)} | {_cell(spec.help)} |"


def _type(path: str, spec: FieldSpec) -> str:
    words = []
    for option in union_members(spec.annotation):
        if get_origin(option) is Literal:
            words += [f"`{choice}`" for choice in get_args(option)]
        elif option is Any:
            words.append("list or mapping")
        else:
            words.append(describe_type(option).removeprefix("a "))
    text = ", ".join(words)
    return f"{text}; {RANGES[path]}" if path in RANGES else text


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f"`{value}`" if isinstance(value, str) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _renamed_rows() -> str:
    moved = {old: new for old, (new, _) in new_names().items() if old not in REPLACED}
    return "".join(f"| `{old}` | `{new}` |\n" for old, new in sorted(moved.items()))


def _replaced_rows() -> str:
    rows = sorted(REPLACED.items())
    return "".join(f"| `{old}` | `{new}` | {_cell(why)} |\n" for old, (new, why) in rows)


if __name__ == "__main__":
    sys.stdout.write(render())

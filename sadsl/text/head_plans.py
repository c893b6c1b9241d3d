"""Reads and writes head plans: a spec for every layer and head, as JSON or as a table.

Such plans are found offline, by profiling or by search, and stored with a model. MoA
(Fu et al., 2024) gives each head a span, S2-Attention (Lin et al., 2024) a phase;
retrieval heads (Wu et al., 2024) are dense where all others are local.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from sadsl.maps.base import IndexMap, PerHead, per_head
from sadsl.maps.growing_spans import moa
from sadsl.maps.named import causal, dilated, sinks, strided, window
from sadsl.terms.base import Spec
from sadsl.terms.heads import Heads, heads
from sadsl.text.parsing import parse

# The fields of an entry, one row for each kind; the first field decides the kind.
KINDS = (("spec", "count"), ("alpha", "beta"), ("window", "dilation", "sinks"))
PLACE = ("layer", "head")


def read_head_plan(
    source: Mapping[str, Any] | str | PathLike[str], num_heads: int | None = None
) -> tuple[Spec, ...]:
    """Reads the spec of every layer, for ``SparseAttention(spec=plan, layer=i)``.

    JSON has the layers in order, each with one spec for all heads or a list of heads::

        {"layers": ["causal()", {"heads": [
            "causal()", {"spec": "causal() & window(128)", "count": 3},
            {"window": 512, "dilation": 2, "sinks": 4}, {"alpha": -64, "beta": 0.5}]}]}

    A table has a row for each layer and head, counted from 0 and in any order. Its
    other columns are the fields of one kind of entry::

        layer,head,window,dilation
        0,0,128,1
        0,1,,4

    ``window`` is how many keys before the query a head reaches; all if it is empty.
    ``dilation`` keeps every ``dilation``-th key of these; ``sinks`` is how many of the
    first keys are kept too. ``alpha`` and ``beta`` give the span ``alpha + beta * n``
    of ``sadsl.catalog.moa``. MoA's own files are read as well: ``{"alphas": [[...]],
    "betas": [[...]]}``, a row for each layer. All entries are causal except specs,
    which say so themselves.

    A layer becomes one spec if its heads are equal; ``per_head(...)`` if they are maps
    (a plan for key heads then also fits query heads, in equal groups); and
    ``heads(...)`` if some are terms.

    Args:
      source: a path, or the text of such a file, or the content of a JSON file.
      num_heads: query heads of the model, to check each layer; None checks nothing.

    Raises:
      ValueError: it is not a plan, or does not fit; the message says where.

    Example:
      >>> import sadsl as sa
      >>> sa.read_head_plan({"layers": [
      ...     "causal()", {"heads": [{"window": 8}, {"window": 8, "sinks": 1}]}]})
      (causal(), per_head(causal() & window(8), causal() & (window(8) | sinks(1))))
      >>> sa.read_head_plan("layer,head,window\\n0,0,128\\n0,1,512")
      (per_head(causal() & window(128), causal() & window(512)),)
    """
    where = ""
    if isinstance(source, PathLike):
        where = f"{Path(source).name}: "
        source = Path(source).read_text(encoding="utf-8")
    if isinstance(source, str):
        is_json = source.lstrip().startswith("{")
        layers = _from_json(source, where) if is_json else _from_table(source, where)
    else:
        layers = _from_content(source, where)
    if not layers:
        _fail(where, "the plan has no layer: give at least one")
    for i, spec in enumerate(layers):
        _check_heads(spec, num_heads, f"{where}layers[{i}]: ")
    return tuple(layers)


def write_head_plan(plan: Iterable[Spec]) -> str:
    """The JSON text of a plan, which ``read_head_plan`` reads back.

    Args:
      plan: the spec of every layer.

    Raises:
      ValueError: a spec holds a map of a class of the caller's, which has no text.

    Example:
      >>> import sadsl as sa
      >>> text = sa.write_head_plan([sa.causal(), sa.window(8)])
      >>> print(text)
      {"layers": [
        {"spec": "causal()"},
        {"spec": "window(8)"}
      ]}
      <BLANKLINE>
      >>> sa.read_head_plan(text)
      (causal(), window(8))
    """
    found = [_written(spec, f"layers[{i}]: ") for i, spec in enumerate(plan)]
    lines = ",\n".join(f"  {json.dumps(layer)}" for layer in found)
    return f'{{"layers": [\n{lines}\n]}}\n'


def _from_json(text: str, where: str) -> list[Spec]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        _fail(f"{where}line {error.lineno}, column {error.colno}: ", error.msg, error)
    return _from_content(content, where)


def _from_content(content: Mapping[str, Any], where: str) -> list[Spec]:
    if "alphas" in content:
        return _from_spans(content, where)
    layers = content.get("layers")
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        known = ", ".join(map(str, content))
        _fail(where, f"has {known or 'nothing'}: it must have a list of 'layers'")
    return [_layer(x, f"{where}layers[{i}]") for i, x in enumerate(layers)]


def _layer(layer: Any, where: str) -> Spec:
    if isinstance(layer, str):
        return _parsed(layer, f"{where}: ")
    if not isinstance(layer, Mapping) or set(layer) not in ({"spec"}, {"heads"}):
        _fail(f"{where}: ", f"is {layer!r}: give a spec, or the list of its 'heads'")
    if "spec" in layer:
        return _parsed(layer["spec"], f"{where}.spec: ")
    entries = layer["heads"]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        _fail(f"{where}.heads: ", f"is {entries!r}: give a list of heads")
    found: list[Spec] = []
    for i, entry in enumerate(entries):
        place = f"{where}.heads[{i}]: "
        fields = {"spec": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, Mapping):
            _fail(place, f"is {entry!r}: give the text of a spec, or an object")
        spec, count = _entry(fields, place)
        found += [spec] * count
    return _joined(found)


def _from_spans(content: Mapping[str, Any], where: str) -> list[Spec]:
    alphas, betas = (content.get(name) for name in ("alphas", "betas"))
    options = {
        name: _integer(content[name], f"{where}{name}: ", least)
        for name, least in {"block": 1, "global_blocks": 0}.items()
        if name in content
    }
    unknown = sorted(set(content) - {"alphas", "betas", *options})
    if unknown:
        _fail(where, f"has the unknown {unknown[0]!r} beside alphas and betas")
    if not isinstance(alphas, Sequence) or not isinstance(betas, Sequence):
        _fail(where, "must have a list a layer in both 'alphas' and 'betas'")
    if len(alphas) != len(betas):
        _fail(where, f"has {len(alphas)} layers of alphas, but {len(betas)} of betas")
    layers: list[Spec] = []
    for i, (row, slopes) in enumerate(zip(alphas, betas, strict=True)):
        if len(row) != len(slopes) or not row:
            _fail(
                f"{where}layer {i}: ",
                f"has {len(row)} alphas and {len(slopes)} betas: give one of each a "
                "head",
            )
        spans = []
        for h, pair in enumerate(zip(row, slopes, strict=True)):
            named = zip(("alphas", "betas"), pair, strict=True)
            spans.append([_float(x, f"{where}{n}[{i}][{h}]: ") for n, x in named])
        layers.append(_joined([_span(a, b, **options) for a, b in spans]))
    return layers


def _from_table(text: str, where: str) -> list[Spec]:
    if "\n" not in text.strip():
        _fail(
            where,
            f"{text.strip()[:60]!r} is neither JSON nor a table with rows: for the "
            "name of a file, give pathlib.Path(name)",
        )
    reader = csv.DictReader(io.StringIO(text.strip()), skipinitialspace=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    if columns[:2] != [*PLACE]:
        _fail(f"{where}line 1: ", f"columns are {columns}: begin with layer, head")
    reader.fieldnames = columns
    found: dict[tuple[int, int], Spec] = {}
    for row in reader:
        place = f"{where}line {reader.line_num}, "
        # csv files extra cells under the name None, and gives None for missing cells.
        if None in row or None in row.values():
            _fail(place, f"does not have the {len(columns)} cells of {columns}")
        layer, head = (_integer(row[n], f"{place}column {n}: ", 0) for n in PLACE)
        cell = layer, head
        if cell in found:
            _fail(place, f"layer {layer}, head {head} stands there twice: remove one")
        given = {n: x for n, x in row.items() if n not in PLACE and x.strip()}
        # An empty window reaches back to the first key.
        endless = {"window": None} if "window" in columns else {}
        found[cell], count = _entry({**endless, **given}, f"{place}column ")
        if count != 1:
            _fail(f"{place}column count: ", "a row of a table is one head")
    return _in_order(found, where)


def _in_order(found: Mapping[tuple[int, int], Spec], where: str) -> list[Spec]:
    """The spec of every layer, from the specs by layer and head."""
    layers = []
    for layer in range(1 + max((i for i, _ in found), default=-1)):
        own = sorted(h for i, h in found if i == layer)
        missing = next((h for h in range(len(own)) if h != own[h]), None)
        if not own or missing is not None:
            lacks = f"head {missing or 0} of layer {layer}"
            _fail(where, f"the table has no row for {lacks}: give every head one")
        layers.append(_joined([found[layer, h] for h in own]))
    return layers


def _entry(fields: Mapping[str, Any], where: str) -> tuple[Spec, int]:
    """The spec of an entry, and for how many heads it is."""
    kind = next((kind for kind in KINDS if kind[0] in fields), None)
    known = "; ".join(", ".join(kind) for kind in KINDS)
    if kind is None:
        _fail(where, f"has {sorted(fields)}: an entry has the fields of one of {known}")
    others = sorted(set(fields) - set(kind))
    if others:
        _fail(f"{where}{others[0]}: ", f"does not go with {kind[0]}: use {known}")
    numbers = {n: x for n, x in fields.items() if x is not None}
    if kind[0] == "spec":
        spec = _parsed(fields["spec"], f"{where}spec: ")
        return spec, _integer(numbers.get("count", 1), f"{where}count: ", 1)
    if kind[0] == "alpha":
        if "beta" not in numbers:
            _fail(f"{where}beta: ", "is missing: a span is alpha + beta * n")
        span = [_float(numbers[n], f"{where}{n}: ") for n in kind]
        return _span(span[0], span[1]), 1
    reach = numbers.get("window")
    reach = None if reach is None else _integer(reach, f"{where}window: ", 0)
    step = _integer(numbers.get("dilation", 1), f"{where}dilation: ", 1)
    first = _integer(numbers.get("sinks", 0), f"{where}sinks: ", 0)
    return _windowed(reach, step, first), 1


def _span(alpha: float, beta: float, **options: int) -> IndexMap:
    """The map of one head of MoA."""
    found = moa([(alpha, beta)], **options)
    assert isinstance(found, PerHead)
    return found.maps[0]


def _windowed(reach: int | None, step: int, first: int) -> IndexMap:
    """Each ``step``-th of the last ``reach`` keys, and the ``first`` keys; causal."""
    if reach is None:
        near = None if step == 1 else strided(step)
    else:
        near = window(reach) if step == 1 else dilated(reach // step, 0, step)
    if near is None:
        return causal()
    return causal() & (near | sinks(first) if first else near)


def _joined(specs: Sequence[Spec]) -> Spec:
    """One spec for a layer, from the spec of each head."""
    if len(set(specs)) == 1:
        return specs[0]
    maps = [spec for spec in specs if isinstance(spec, IndexMap)]
    if len(maps) == len(specs):
        return per_head(*maps)
    return heads(*((spec, len(list(same))) for spec, same in groupby(specs)))


def _check_heads(spec: Spec, num_heads: int | None, where: str) -> None:
    if num_heads is None:
        return
    match spec:
        case Heads():
            fits, has = spec.num_heads == num_heads, spec.num_heads
        case PerHead(maps):
            fits, has = num_heads % len(maps) == 0, len(maps)
        case _:
            return
    if not fits:
        _fail(where, f"is for {has} heads, which do not fit num_heads={num_heads}")


def _written(spec: Spec, where: str) -> Any:
    """A layer as values for JSON: a list of heads if that reads back, else one spec."""
    match spec:
        case PerHead(maps):
            entries: list[Any] = [repr(map) for map in maps]
        case Heads(shares):
            entries = [{"spec": repr(part), "count": n} for part, n in shares]
        case _:
            entries = []
    text = repr(spec)
    try:
        found = parse(text)
    except ValueError as error:
        _fail(where, f"{text} has no text that parse reads: {error}", error)
    if found != spec:
        _fail(where, f"parse reads another spec from the text {text}")
    by_head = {"heads": entries}
    # A list of heads may read back as another spec, since equal heads are joined.
    return by_head if entries and _layer(by_head, where) == spec else {"spec": text}


def _parsed(text: Any, where: str) -> Spec:
    if not isinstance(text, str):
        _fail(where, f"is {text!r}: give the text of a spec")
    return _read(parse, text, where)


def _integer(value: Any, where: str, least: int) -> int:
    found = _read(int, value, where) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        _fail(where, f"is {value!r}: it must be an integer of at least {least}")
    return found


def _float(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        _fail(where, f"is {value!r}: it must be a number")
    found = _read(float, value, where)
    if not isfinite(found):
        _fail(where, f"is {value!r}: it must be finite")
    return found


def _read(read: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return read(value)
    except ValueError as error:
        _fail(where, str(error), error)


def _fail(where: str, what: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(f"head plan: {where}{what}") from cause

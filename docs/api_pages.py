"""Writes the pages of the API: one for each wing, its names from the packages."""

import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

# The wings of ``sadsl`` in the order of the import arrows, with what is in them.
WINGS = {
    "maps": ("Maps", "Which keys a query sees, decided by positions."),
    "selections": ("Selections", "Maps decided by content: queries, keys, gates."),
    "terms": ("Terms", "How pairs are scored and normalised, and how terms combine."),
    "text": ("Text and files", "Specs and plans as text, JSON and files."),
    "run": ("Calls", "Attention on arrays, plans, choices, recurrent decoding."),
    "decode": ("Decoding", "Caches that follow from a spec, prefill and step."),
    "sharding": ("Several devices", "Calls dealt over a mesh, and what travels."),
    "analysis": ("Analysis", "What can be said without running anything."),
    "kernels": ("Kernel settings", "What a call may say to the compiler."),
}
# Exported by ``sadsl``, defined below it.
LOWER = {"KernelConfig": "kernels", "Tile": "kernels", "Plan": "run"}

LAYERS = {
    "sadsl.layers": ("attention_fn", "per_layer", "run_stack", "choice_sources"),
    "sadsl.layers.nnx": (
        "SparseAttention", "LinearAttention", "GatedLinearAttention", "DeltaNet",
        "GatedDeltaNet", "KimiDelta", "LightNet",
        "IndexedAttention", "RoutingAttention", "commitment_loss", "BlockCompressor",
    ),
    "sadsl.layers.linen": (
        "SparseAttention", "LinearAttention", "GatedLinearAttention", "DeltaNet",
        "GatedDeltaNet", "KimiDelta", "LightNet",
        "IndexedAttention", "RoutingAttention", "BlockCompressor",
    ),
    "sadsl.layers.linear_models": (
        "linear_attention", "gated_linear_attention", "delta_net", "gated_delta_net",
        "kimi_delta", "light_net",
    ),
    "sadsl.layers.linear": (
        "LinearLayer", "OutputNorm", "Running", "LinearLayerState",
    ),
    "sadsl.layers.parts": (
        "short_convolution", "decay_gate", "slow_decay", "write_strength",
        "hgrn2_gates", "gated_rms_norm",
    ),
    "sadsl.layers.indexed_models": (
        "deepseek_v32", "deepseek_v4", "glm_5", "glm_5_next", "hy_v4",
        "mistral_large_4", "minimax_m3", "qwen4_exp", "LatentDims", "EntryDims",
    ),
    "sadsl.layers.indexed": ("IndexedLayer", "LayerOutput"),
    "sadsl.layers.indexers": ("Indexer", "PooledKeys"),
    "sadsl.layers.indexed_loss": ("choice_loss",),
    "sadsl.layers.indexer": ("indexer_loss", "causal_lists"),
    "sadsl.layers.transforms": ("HeadTransforms", "QKNorm", "OutputGate"),
    "sadsl.layers.rotary": ("Rotary", "document_positions"),
    "sadsl.layers.rotary_scaling": ("LinearScaling", "NtkScaling", "YarnScaling"),
    "sadsl.layers.norms": ("RowNorm",),
    "sadsl.layers.weights": ("from_flax", "to_flax"),
    "sadsl.layers.combiner": (
        "Combiner", "RowKeys", "CombinerAttention", "LinenCombinerAttention",
    ),
    "sadsl.layers.routing": ("Routing",),
    "sadsl.layers.gate": ("BlockGate", "target", "distillation_loss"),
}  # fmt: skip


def public(module: ModuleType) -> list[str]:
    """The names that a package exports, or that a module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    is_package = hasattr(module, "__path__")
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (is_package or value.__module__ == module.__name__)
    )


def entry(module: str, name: str) -> str:
    """The directive for a function or a class."""
    value = getattr(importlib.import_module(module), name)
    kind = "class" if inspect.isclass(value) else "function"
    return f".. auto{kind}:: {module}.{name}\n"


def summary(module: str, names: Iterable[str]) -> str:
    """A table of names with the first sentences of their docstrings."""
    lines = [".. list-table::", "   :widths: auto", ""]
    for name in names:
        value = getattr(importlib.import_module(module), name)
        role = "class" if inspect.isclass(value) else "func"
        first = (inspect.getdoc(value) or "").split("\n\n")[0]
        lines.append(f"   * - :py:{role}:`~{module}.{name}`")
        lines.append(f"     - {' '.join(first.split()).removesuffix('::')}")
    return "\n".join([*lines, ""])


def heading(text: str, mark: str = "=") -> str:
    """A title, underlined."""
    return f"{text}\n{mark * len(text)}\n"


def page(title: str, text: str, parts: dict[str, list[str]]) -> str:
    """A page of one or more modules: a table of the names, then each of them."""
    found = [heading(title), text + "\n"]
    for module, names in parts.items():
        if len(parts) > 1:
            found.append(heading(module, "-"))
        found.append(summary(module, names))
        found += [entry(module, name) for name in names]
    return "\n".join(found)


def wing_of(name: str) -> str:
    """The wing of ``sadsl`` that an exported name belongs to."""
    sadsl = importlib.import_module("sadsl")
    module = getattr(sadsl, name).__module__.split(".")
    return LOWER[name] if module[0] != "sadsl" else module[1]


def pages() -> dict[str, str]:
    """All pages by the names of their files."""
    found = {}
    exported = public(importlib.import_module("sadsl"))
    for wing, (title, text) in WINGS.items():
        names = [name for name in exported if wing_of(name) == wing]
        said = f"{text} Reached as ``sadsl.name``."
        parts = {"sadsl": names}
        if wing == "selections":
            module = importlib.import_module("sadsl.selections")
            more = [name for name in public(module) if name not in names]
            parts["sadsl.selections"] = more
        found[wing] = page(f"{title}", said, parts)
    catalog = ("sadsl.catalog", "sadsl.catalog.models")
    found["catalog"] = page(
        "Catalogue",
        "Published mechanisms, each a spec of a few lines with its source; and the "
        "specs of every layer of published hybrids.",
        {name: public(importlib.import_module(name)) for name in catalog},
    )
    found["layers"] = page(
        "Layers",
        "Flax modules. They need the extra ``flax``.",
        {module: list(names) for module, names in LAYERS.items()},
    )
    splash = importlib.import_module("sadsl.splash")
    found["splash"] = page(
        "Splash",
        "The interface of jax's splash attention. Import ``sadsl.splash`` by name.",
        {"sadsl.splash": public(splash)},
    )
    plot = importlib.import_module("sadsl.plot")
    found["plot"] = page(
        "Pictures",
        "Drawings of maps and plans. They need the extra ``viz``.",
        {"sadsl.plot": public(plot)},
    )
    return found


def write(folder: Path) -> None:
    """Writes the pages and their index into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / f"{name}.rst").write_text(text)
    names = "\n".join(f"   {name}" for name in pages())
    index = (
        f"{heading('API')}\nOne page for each wing of the package, made from the "
        f"docstrings. Everything on the first {len(WINGS)}\npages is reached as "
        "``sadsl.name``; import ``sadsl.selections``, ``sadsl.catalog``, "
        "``sadsl.layers.nnx``,\n``sadsl.layers.linen`` and ``sadsl.plot`` by name.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{names}\n"
    )
    (folder / "index.rst").write_text(index)

"""Write the model card (`README.md`) of a quantized checkpoint or a bundle, in Markdown with the hub's front matter.

Everything in it comes from the record of the quantization and from the manifest. Nothing is measured here, and nothing
touches the network. Texts that somebody else may have written are made plain first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_edge.base.hub import HubSource, is_hub_id
from internvl_edge.base.text import one_line
from internvl_edge.base.units import rounded, size
from internvl_edge.bundle.gate import METRICS
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import DECODERS
from internvl_edge.bundle.quality_record import quality_of
from internvl_edge.checkpoint.license import License
from internvl_edge.checkpoint.record import QuantizationRecord
from internvl_edge.model.components import Component
from internvl_edge.model.linear import Scheme

from .programs import programs

_PROJECT = "https://github.com/internvl-edge/internvl-edge"
_VLLM = f"{_PROJECT}/blob/main/docs/quality.md#loaded-by-vllm"
_RECIPES = f"{_PROJECT}/blob/main/docs/recipes.md"
_TRUST = (
    "`--trust-remote-code` runs the code of the original's configuration, which vLLM asks for. The layout of "
    "transformers does not need it."
)
# What Markdown and HTML would read as more than text.
_MARKUP = str.maketrans({character: f"&#{ord(character)};" for character in "&<>`|*[]\\"})


@dataclass(frozen=True)
class Place:
    """Where the thing that a card is about can be had.

    Attributes:
        repository: its hub id; "" while it lies in a folder only.
        revision: the commit to pin; "" for none.
    """

    repository: str = ""
    revision: str = ""

    def words(self, folder: str) -> str:
        """Return how commands name it: the hub id with its revision, or a word for the folder."""
        if not self.repository:
            return folder
        return f"{self.repository} --revision {self.revision}" if self.revision else self.repository


def checkpoint_card(
    record: QuantizationRecord, layout: str, license_: License | None = None, place: Place | None = None
) -> str:
    """Return the card of a quantized checkpoint.

    Args:
        record: how it was quantized.
        layout: of its configuration, as in `ModelConfig`.
        license_: that of the original; None where nobody knows.
        place: where it lies; the default is a folder.
    """
    place = place or Place()
    schemes = {linear.name: linear.scheme for linear in record.linears}
    card = _Card(f"{_name(record.checkpoint)}, quantized")
    card.text(
        f"This is {_original(record.hub, record.checkpoint)}, quantized with [internvl-edge]({_PROJECT}). "
        f"Its weights take {size(sum(record.weights.values()))}."
    )
    card.text(*_license_text(license_))
    card.section("How it is stored")
    card.parts(record.components)
    card.section("Recipe")
    card.text(f"The [recipe]({_RECIPES}) as a file for `internvl-edge quantize --recipe FILE`:")
    card.code(recipe_toml(record.recipe), "toml")
    card.section("Errors that were measured while quantizing")
    card.text(*_errors(record))
    card.section("Run it with internvl-edge")
    name = place.words("FOLDER")
    card.code(
        'pip install "internvl-edge[cpu,export]"\n'
        f"internvl-edge export {name} -o bundle\n"
        'internvl-edge run bundle --image photo.jpg "What is this?"'
    )
    others = programs(schemes, layout, *place.words("FOLDER").split())
    for program in others:
        card.section(f"Load it with {program.name}")
        if program.obstacles:
            why = "; ".join(program.obstacles)
            card.text(f"{program.name} does not load this checkpoint: {why} ([details]({_VLLM})).")
            continue
        card.code(program.command)
        card.text(
            "" if program.tried else f"The source of {program.name} says so; nobody has tried it.",
            _TRUST if "--trust-remote-code" in program.command else "",
            f"Not on a CPU: {program.only_gpu} ([details]({_VLLM}))." if program.only_gpu else "",
        )
    loading = [program.name.lower() for program in others if program.tried and not program.obstacles]
    tags = ["internvl", *_bits(schemes.values()), *loading]
    return card.document(_front_matter(record.hub, license_, tags, quantized=True))


def bundle_card(
    manifest: Manifest,
    record: QuantizationRecord | None = None,
    place: Place | None = None,
    engines: Iterable[str] = (),
) -> str:
    """Return the card of a bundle.

    Args:
        manifest: of the bundle, with its quality figures.
        record: how its checkpoint was quantized; None where it was not, or nobody knows.
        place: where it lies; the default is a folder.
        engines: the names of the TensorRT engines that lie beside it.
    """
    place, quality = place or Place(), quality_of(manifest)
    name = place.words("FOLDER")
    card = _Card(f"{_name(record.checkpoint if record else manifest.source)} for internvl-edge")
    card.text(
        f"This is {_original(manifest.hub, manifest.source)} as a bundle of ONNX graphs for "
        f"[internvl-edge]({_PROJECT}): {size(sum(entry.bytes for entry in manifest.files.values()))} in "
        f"{len(manifest.files)} files. The manifest holds the SHA-256 of each, and loading compares them."
    )
    card.text(*_license_text(manifest.license))
    card.section("Run it")
    card.code(f'pip install "internvl-edge[cpu,hub]"\ninternvl-edge run {name} --image photo.jpg "What is this?"')
    revision = f', revision="{place.revision}"' if place.revision else ""
    card.code(
        "from internvl_edge import InternVL\n\n"
        f'model = InternVL.load("{place.repository or "FOLDER"}"{revision})\n'
        'print(model.chat("What is this?", images=["photo.jpg"]).text)',
        "python",
    )
    if DECODERS["standard"] in manifest.files:
        there = ", ".join(f"`{engine}`" for engine in engines)
        card.text(
            f"TensorRT engines for {there} lie in `engines/`." if there else "",
            "On a Jetson or an RTX card, this makes TensorRT engines beside it (`internvl-edge devices` lists names):",
        )
        card.code(f"internvl-edge build {name} --device NAME")
    card.section("Quality")
    if quality.figures:
        card.table(
            ["figure", "value", "what it is", "measured on"],
            [
                [f"`{metric}`", METRICS[metric].show(value), METRICS[metric].meaning, _measured(quality, metric)]
                for metric, value in quality.figures.items()
                if metric in METRICS
            ],
        )
    else:
        card.text("Nobody has measured the quality of this bundle with `internvl-edge evaluate`.")
    if quality.gate:
        card.text(f"Conditions: {quality.state} ({_plain('; '.join(map(str, quality.gate)))}).")
    if quality.accepted:
        card.text(f"Used nevertheless: {_plain(quality.accepted)}")
    card.section("How it is stored")
    card.text(
        f"Floats are stored in {manifest.dtype}, and the graphs compute in {manifest.activations}. The KV cache has "
        f"{manifest.kv_cache or manifest.activations}."
    )
    card.parts(manifest.components)
    if record:
        card.section("Recipe")
        card.code(recipe_toml(record.recipe), "toml")
        card.text(*_errors(record))
    tags = ["internvl", "onnx", *_bits(manifest.linears.values())]
    return card.document(_front_matter(manifest.hub, manifest.license, tags, manifest.is_quantized))


def recipe_toml(recipe: Mapping[str, Any]) -> str:
    """Return the recipe of a record as the text of a recipe file."""
    lines, tables = [], []
    for name, value in recipe.items():
        if name == "layers":
            # The last exception that matches applies, so a pattern that comes again has its place at the end.
            last = {pattern: place for place, (pattern, _) in enumerate(value)}
            value = {pattern: value[place][1] for pattern, place in sorted(last.items(), key=lambda item: item[1])}
        if isinstance(value, Mapping):
            rows = [f"{_key(key)} = {_toml(each)}" for key, each in value.items() if each is not None]
            tables += ["", f"[{_key(name)}]", *rows] if rows else []
        elif value is not None:
            lines.append(f"{_key(name)} = {_toml(value)}")
    return "\n".join([*lines, *tables])


@dataclass
class _Card:
    """The body of a card, block by block."""

    title: str
    blocks: list[str] = field(default_factory=list)

    def section(self, heading: str) -> None:
        self.blocks.append(f"## {heading}")

    def text(self, *sentences: str) -> None:
        if said := " ".join(sentence for sentence in sentences if sentence):
            self.blocks.append(said)

    def code(self, text: str, language: str = "") -> None:
        self.blocks.append(f"```{language}\n{text}\n```")

    def table(self, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines = [heading, ["---"] * len(heading), *rows]
        self.blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def parts(self, components: Iterable[Component]) -> None:
        self.table(
            ["part", "parameters", "size", "bits per weight", "linears"],
            [
                [
                    _plain(part.name),
                    f"{part.parameters:,}",
                    size(part.bytes),
                    f"{part.bits_per_weight:.2f}",
                    _plain(", ".join(f"{stored.linears} x {stored}" for stored in part.stored)) or "-",
                ]
                for part in components
            ],
        )

    def document(self, front_matter: str) -> str:
        return f"---\n{front_matter}---\n\n# {self.title}\n\n" + "\n\n".join(self.blocks) + "\n"


def _front_matter(hub: HubSource | None, license_: License | None, tags: Sequence[str], quantized: bool) -> str:
    entries: dict[str, Any] = {}
    if base := _base(hub):
        entries["base_model"] = base
        if quantized:
            entries["base_model_relation"] = "quantized"
    entries |= {"library_name": "internvl-edge", "pipeline_tag": "image-text-to-text"}
    if license_:
        entries["license"] = license_.id
        entries |= {"license_name": license_.name} if license_.name else {}
        entries |= {"license_link": license_.link} if license_.link else {}
    entries["tags"] = list(tags)
    # JSON is YAML, and quoted so that nothing in a value means more than text.
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items())


def _license_text(found: License | None) -> list[str]:
    if found is None:
        return ["The license of the original applies; it was not known where this card was written."]
    named = f"{found.id}, {found.name}" if found.name else found.id
    return [f"The license is that of the original: {_plain(named)}{f' ({_plain(found.link)})' if found.link else ''}."]


def _errors(record: QuantizationRecord) -> list[str]:
    """Say what the quantization found on its calibration data."""
    said = []
    if record.samples:
        said.append(
            f"Calibration used {record.samples} samples with {record.tokens:,} tokens, {record.image_tokens:,} of them "
            "of images."
        )
    if errors := record.errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = rounded(sum(errors.values()) / len(errors))
        said.append(
            f"The relative output error of a linear is {mean} on average and {rounded(errors[worst])} at most "
            f"(`{worst}`)."
        )
    if record.tower:
        said.append(
            f"The cosine between image embeddings of the int8 tower and of the float one is {record.tower.cosine:.5f} "
            f"on average over {record.tower.tiles} tiles, and {record.tower.lowest_cosine:.5f} at least."
        )
    if record.predicted_kl is not None:
        said.append(f"The predicted divergence of the next token is {rounded(record.predicted_kl)} nats.")
    return said or ["Nothing was measured: the weights were rounded without data."]


def _measured(quality: Any, metric: str) -> str:
    how = quality.measured.get(METRICS[metric].run)
    if how is None:
        return "-"
    beside = f", against {how.reference}" if how.reference else ""
    return _plain(f"{how.questions} questions of {how.data}{beside}, {how.engine} on {how.device}")


def _bits(schemes: Iterable[Scheme | None]) -> list[str]:
    """Return the hub's tag for the number of bits that most linears have."""
    counted = Counter(scheme.bits for scheme in schemes if scheme)
    return [f"{counted.most_common(1)[0][0]}-bit"] if counted else []


def _base(hub: HubSource | None) -> str:
    """Return the hub id of the original, "" where nobody knows one."""
    return hub.repository if hub and is_hub_id(hub.repository) else ""


def _original(hub: HubSource | None, source: str) -> str:
    """Name the original: with a link where it came from the hub."""
    base = _base(hub)
    named = f"[{base}](https://huggingface.co/{base})" if base else _plain(source)
    return f"{named} (commit {_plain(hub.commit)})" if hub else named


def _name(source: str) -> str:
    """Return a short name: that of the repository without its owner."""
    return _plain(source.rpartition("/")[2] or source)


def _plain(text: str) -> str:
    return one_line(text, 300).translate(_MARKUP)


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() and name.isascii() else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    return "".join(character if character.isprintable() else f"\\U{ord(character):08x}" for character in text)

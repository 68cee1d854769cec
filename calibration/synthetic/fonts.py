"""The typefaces of the synthetic pictures, one disjoint set per split.

Every face is in a Python package (extra ``synthetic``), so pictures are the same on every machine with the same package
versions. This module does not know words, layouts or tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import install


@dataclass(frozen=True)
class Face:
    """One font file: the distribution that contains it, the module that it installs, and the path inside the module."""

    distribution: str
    module: str
    path: str


def _family(name: str, *files: str) -> tuple[Face, ...]:
    module = "fontpkg_" + name.replace("-", "_")
    return tuple(Face("fontpkg-" + name, module, f"files/{file}.ttf") for file in files)


def _noto_cjk(weight: str) -> Face:
    distribution = f"cvttf-notosanscjk-{weight.lower()}"
    return Face(distribution, f"cvttf_NotoSansCJK_{weight}", f"NotoSansCJKtc-{weight}.otf")


LATIN: dict[str, tuple[Face, ...]] = {
    "train": (
        *_family("arimo", "Arimo[wght]"),
        *_family("barlow", "Barlow-Regular", "Barlow-Medium", "Barlow-Bold"),
        *_family("dm-mono", "DMMono-Regular", "DMMono-Medium"),
        *_family("fira-sans", "FiraSans-Regular", "FiraSans-Medium", "FiraSans-Bold"),
        *_family("ibm-plex-mono", "IBMPlexMono-Regular", "IBMPlexMono-SemiBold"),
        *_family("ibm-plex-serif", "IBMPlexSerif-Regular", "IBMPlexSerif-SemiBold"),
        *_family("lato", "Lato-Regular", "Lato-Bold"),
        *_family("open-sans", "OpenSans[wdth,wght]"),
        *_family("poppins", "Poppins-Regular", "Poppins-Medium"),
        *_family("pt-serif", "PT_Serif-Web-Regular", "PT_Serif-Web-Bold"),
        *_family("roboto", "Roboto[wdth,wght]"),
        *_family("roboto-mono", "RobotoMono[wght]"),
        *_family("titillium-web", "TitilliumWeb-Regular", "TitilliumWeb-SemiBold"),
        *_family("zilla-slab", "ZillaSlab-Medium", "ZillaSlab-Bold"),
    ),
    "validation": (
        *_family("hind", "Hind-Regular", "Hind-SemiBold"),
        *_family("ibm-plex-sans", "IBMPlexSans[wdth,wght]"),
    ),
    "test": (
        *_family("libre-franklin", "LibreFranklin[wght]"),
        *_family("pt-sans", "PT_Sans-Web-Regular", "PT_Sans-Web-Bold"),
        *_family("sarabun", "Sarabun-Regular", "Sarabun-SemiBold"),
    ),
}

CHINESE: dict[str, tuple[Face, ...]] = {
    "train": (_noto_cjk("Regular"), _noto_cjk("Bold")),
    "validation": (_noto_cjk("DemiLight"),),
    "test": (_noto_cjk("Medium"),),
}


@cache
def font_path(face: Face) -> Path:
    """Return the path of the face's file. Raises EdgeError, naming the package to install, when the file is missing."""
    spec = find_spec(face.module)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / face.path
        if path.is_file():
            return path
    raise EdgeError(
        f"the synthetic pictures need the font package {face.distribution}, which is not installed; "
        f"install the extra: {install('synthetic')}"
    )


@lru_cache(maxsize=4096)
def load_font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    """Return the face at `size` pixels per em.

    It uses PIL's basic layout without a shaping library, so that the result is the same on every machine.
    """
    font = ImageFont.truetype(str(font_path(face)), size, layout_engine=ImageFont.Layout.BASIC)
    if "wght]" in face.path:  # a variable font starts at its default, which for some families is the thinnest weight
        font.set_variation_by_name("Regular")
    return font

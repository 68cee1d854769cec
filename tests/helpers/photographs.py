"""Photographs as phones store them: the pixels lie on their side, and the EXIF orientation says so."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def sideways(picture: Path, target: Path) -> Path:
    """Store a picture so that only who heeds the EXIF orientation (6: turn by 90 degrees clockwise) sees it upright."""
    noted = Image.Exif()
    noted[0x0112] = 6
    Image.open(picture).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(target, exif=noted)
    return target

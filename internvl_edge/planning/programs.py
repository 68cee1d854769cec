"""The compiled programs of a decoder's engine: which ones an engine gets, what they hold, and what a step moves.

An engine has one program per optimization profile, that is per range of shapes. A program for any number of rows is
slow for one row: attention of several rows copies and transposes the used part of the KV cache first. So a step of one
token has programs of its own, where memory allows them. An engine for several rows has one program for prompts, of one
row, and one for steps of one token of each row. This module knows numbers. It does not know TensorRT.
"""

from __future__ import annotations

from enum import IntEnum

# Bytes of kernel code and tables per layer that each further program adds to an engine. With TensorRT for RTX 1.7, 0.45
# to 0.8 MB were measured on decoders of a 1B (docs/performance.md).
CODE_PER_LAYER = 600_000
# How often the window of a 16-bit cache is moved where a step copies it: read, written and read again.
COPIED = 3
# The most rows of an engine, and the slots of the cache by which a row grows where there are several.
MOST_ROWS = 64
_SLOTS = 128


class Programs(IntEnum):
    """The programs of a decoder's engine. The value is the number of its optimization profiles.

    ONE serves prompts and steps of one token. STEP is one more, for steps of one token, which copies the used part of
    the cache. WHOLE is a third, for steps of one token too, which reads the whole capacity of the cache in place. An
    engine for several rows has STEP, whose steps read the whole capacity.
    """

    ONE = 1
    STEP = 2
    WHOLE = 3


def slots_of(capacity: int, rows: int) -> int:
    """Return the slots of one row of the KV cache, for a capacity in tokens.

    A step of several rows computes all of them, and writes an entry behind the last one of those that take no part. So
    there is a slot more, and the number is rounded up: the address of each row is a multiple of 256 bytes then, which
    TensorRT requires.
    """
    return capacity if rows == 1 else (capacity // _SLOTS + 1) * _SLOTS


def fastest_programs(flavour: str, cache_bytes: int, int8_body: bool, rows: int = 1) -> Programs:
    """Return the programs with which steps move the fewest bytes. Those for several rows read the whole cache in place.

    Args:
        flavour: the TensorRT that builds, "tensorrt" or "tensorrt_rtx".
        cache_bytes: bytes of a value in the KV cache. An int8 cache is widened before attention in any program.
        int8_body: whether linears of layers have int8 weights and floating-point inputs. Programs for one row of
            TensorRT for RTX 1.7 dequantize these in memory, which moves five times their bytes.
        rows: the sequences that the cache holds side by side.
    """
    if rows > 1:
        return Programs.STEP
    if flavour == "tensorrt_rtx" and int8_body:
        return Programs.ONE
    return Programs.WHOLE if flavour == "tensorrt_rtx" and cache_bytes > 1 else Programs.STEP


def least_programs(rows: int) -> Programs:
    """Return the programs that need least memory. Prompts of several rows would need a large one together."""
    return Programs.ONE if rows == 1 else Programs.STEP


def further_bytes(programs: Programs, layers: int, twice: int) -> int:
    """Return the bytes that an engine holds in addition to the weights and to the program for prompts.

    Args:
        programs: the programs of the engine.
        layers: the number of layers of the decoder.
        twice: bytes of the weights that programs for one row store in another order.
    """
    return 0 if programs == Programs.ONE else twice + (programs - 1) * layers * CODE_PER_LAYER


def reads_whole(window: int, capacity: int) -> bool:
    """Return whether a step moves fewer bytes if it reads the whole cache in place than if it copies the window.

    Args:
        window: slots of the cache that the step needs.
        capacity: slots of the cache.
    """
    return COPIED * window > capacity

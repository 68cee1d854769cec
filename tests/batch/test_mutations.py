"""Mutated tables and journals: each is read, or refused by one line; a journal never loses or repeats a whole row."""

from __future__ import annotations

from helpers.parsers import BatchJournal, BatchTable, outcomes

TABLES, JOURNALS = 1500, 600


def test_mutated_tables_give_items_or_one_line() -> None:
    read = 0
    for _, items, line in outcomes(BatchTable, TABLES):
        if line is None:
            read += 1
            assert len({item.id for item in items}) == len(items)
            assert all(item.ask.prompt and len(item.request) == 16 for item in items)
        else:
            assert "table." in line
    assert TABLES / 10 < read < TABLES * 0.9


def test_mutated_journals_are_continued_or_refused() -> None:
    read = 0
    for _, left, line in outcomes(BatchJournal, JOURNALS):
        read += line is None
        assert (left is not None) == (line is None)
    assert JOURNALS / 10 < read < JOURNALS * 0.9

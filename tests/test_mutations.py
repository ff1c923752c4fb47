"""The faults of mutations.py can be put in: their texts are in the files, and the tests exist."""

import ast

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation, main


def test_there_are_five_for_each_part() -> None:
    rooms = [mutation.file.split("/")[1] for mutation in MUTATIONS]
    assert [rooms.count(room) for room in ("core", "model", "io")] == [5, 5, 5]
    assert len(MUTATIONS) == len({mutation.fault for mutation in MUTATIONS}) == 20


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_it_can_be_put_in(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))
    assert mutation.tests
    for one in mutation.tests:
        file, _, test = one.partition("[")[0].partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") or not test


def test_what_the_command_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "1", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["1", "paramtree/core/structure.py:"],
        ["20", "paramtree/io/load.py:"],
    ]
    with pytest.raises(SystemExit):
        main(["--only", "21"])
    assert "the faults have the numbers 1 to 20" in capsys.readouterr().err

"""What the programs share on the command line."""

import pytest

from keras_fpn.runs import alternating, train
from keras_fpn.runs.command import counted


def test_a_noun_follows_its_number():
    assert [counted(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize("program", [train, alternating])
def test_a_program_names_itself_where_its_options_are_wrong(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--dataset=x", "--output=y", "--nonsense"])
    name = program.__name__.rpartition(".")[-1]
    assert f"keras-fpn {name} --help" in capsys.readouterr().err

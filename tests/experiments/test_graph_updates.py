"""Reading what XLA tells of its graphs, from lines of a run on an H100."""

import signal
import subprocess
import sys

import pytest

from dvi_jax.errors import UserError
from experiments import graph_updates
from experiments.graph_updates import Event, Graphs, main, read, second_half

UPDATE = (
    "I1128 02:03:48.992246    8165 command_buffer_thunk.cc:336] [0] Create/Update command buffer by recoding command"
    " buffer cmd sequence after 2 executions since last update; num_commands=330; updated_allocs=1;"
    " is_first_record_on_new_command_buffer=0\n"
    "I1128 02:03:48.993799    8165 command_buffer_thunk.cc:362] [0] Updated command buffer in 1510 μs;"
    " num_commands=330\n"
)
RUN = "I1128 02:03:48.993821    8165 command_buffer_thunk.cc:371] [0] Execute command buffer; num_executions=1\n"


def test_runs_and_updates_are_told_apart_and_the_rest_is_passed_on(capsys):
    text = "slots 16\n" + UPDATE + RUN + RUN + "a warning\n"
    assert list(read(text.splitlines(keepends=True))) == [Event(330, 1510), Event(0, 0), Event(0, 0)]
    assert capsys.readouterr().err == "slots 16\na warning\n"


def test_the_second_half_is_counted():
    run, update = Event(0, 0), [Event(91, 500), Event(330, 1500)]
    assert second_half([*update, run, run, update[0], run, run, update[1], run]) == Graphs(2, {330: [1500]})
    assert second_half([]) == Graphs(0, {})


def test_an_experiment_is_run_and_counted(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "made.py").write_text(
        f"import os, sys\nsys.stderr.write({2 * (UPDATE + RUN)!r})\n"
        "assert 'command_buffer_thunk' in os.environ['TF_CPP_VMODULE']\nsys.exit(len(sys.argv) - 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["made", "--an-option"]) == 0
    table = capsys.readouterr().out
    assert "run 1 times" in table
    assert [word for word in ("330", "1.51") if word not in table] == []
    (folder / "silent.py").write_text("print('nothing')\n")
    with pytest.raises(UserError, match="XLA told of no graph"):
        main(["silent"])
    with pytest.raises(UserError, match=r"experiments\.made has failed \(1\)"):
        main(["made", "one", "two"])
    for given in ([], ["../made"]):
        with pytest.raises(UserError, match="name an experiment"):
            main(given)


def test_who_ends_it_ends_the_experiment(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    folder.mkdir()
    slow = f"import sys, time\nsys.stderr.write({UPDATE!r})\nsys.stderr.flush()\ntime.sleep(600)\n"
    (folder / "slow.py").write_text(slow)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(graph_updates, "Event", interrupted)
    begun, popen = [], subprocess.Popen

    def noted(*given, **options):
        begun.append(popen(*given, **options))
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", noted)
    with pytest.raises(KeyboardInterrupt):
        main(["slow"])
    assert begun[0].wait(60) == -signal.SIGTERM


def interrupted(*values):
    raise KeyboardInterrupt


def test_its_own_options_are_those_of_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["graph_updates"])
    with pytest.raises(UserError, match="name an experiment"):
        graph_updates.main()

"""What a log shows of work that takes long."""

from keras_emr_cli import load_data, reporter


def test_lines_of_a_log(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: now[0])
    lines = reporter._Lines("square")
    told = []
    for seconds, done in [
        (0, 0),
        (30, 5),
        (61, 10),
        (90, 15),
        (7300, 40),
        (7400, 100),
        (7500, 100),
    ]:
        now[0] = float(seconds)
        told.append(lines.tell(done, 100))
    assert told == [
        None,
        None,
        "square  10 %, about 9 min 9 s left",
        None,
        "square  40 %, about 3 h 2 min left",
        "square  done in 2 h 3 min",
        None,
    ]
    now[0] = 0.0
    quick = reporter._Lines("fgsm")
    assert quick.tell(1, 1) == "fgsm  done in 0 s"
    stuck = reporter._Lines("fab")
    now[0] = 100.0
    assert stuck.tell(0, 9) == "fab  0 %"


def test_a_first_look_that_takes_long_is_told(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(load_data.time, "monotonic", lambda: now[0])
    with load_data.LookingAtImages() as look:
        look(1, 9)
        now[0] = 2.0
        look(9, 9)
    assert capfd.readouterr().err == ""  # soon done
    now[0] = 0.0
    with load_data.LookingAtImages() as look:
        for now[0], done in [(4.0, 10), (70.0, 50), (140.0, 100)]:
            look(done, 100)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("looking at every image  50 %, about")
    assert told[1].startswith("looking at every image  done in")
    now[0] = 0.0
    with load_data.LookingAtImages(quiet=True) as look:
        now[0] = 99.0
        look(1, 9)
    assert capfd.readouterr().err == ""


def test_a_run_that_learned_nothing_is_told_so(capsys):
    from keras_emr_cli.progress import warn_of_chance

    warn_of_chance("trades", [{"val_accuracy": 0.5}, {"val_accuracy": 0.1}], 10)
    assert capsys.readouterr().err == ""
    warn_of_chance("trades", [{"val_accuracy": 0.08}, {"val_accuracy": 0.11}], 10)
    assert "trades has learned nothing: its validation accuracy never rose above 11.0%" in (
        capsys.readouterr().err
    )
